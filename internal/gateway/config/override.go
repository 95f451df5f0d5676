package config

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// envPrefix begins the environment variables that override a key: admin.listen
// is INTERLOCK_ADMIN_LISTEN.
const envPrefix = "INTERLOCK_"

// leaves are the keys that can be overridden: all that are not in a list of
// objects. Lists of words take commas between.
func (c *Config) leaves() map[string]reflect.Value {
	out := map[string]reflect.Value{}
	var walk func(prefix string, v reflect.Value)
	walk = func(prefix string, v reflect.Value) {
		for i := range v.NumField() {
			key, f := prefix+v.Type().Field(i).Tag.Get("yaml"), v.Field(i)
			switch {
			case f.Kind() == reflect.Struct:
				walk(key+".", f)
			case f.Kind() != reflect.Slice || f.Type().Elem().Kind() == reflect.String:
				out[key] = f
			}
		}
	}
	walk("", reflect.ValueOf(c).Elem())
	return out
}

// Env is the environment variable that overrides a key.
func Env(key string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// Keys are those that the environment and --set can override, in order.
func Keys() []string {
	return slices.Sorted(maps.Keys(new(Config).leaves()))
}

func (c *Config) override(environ, set []string) error {
	leaves := c.leaves()
	for key, v := range leaves {
		for _, e := range environ {
			if value, ok := strings.CutPrefix(e, Env(key)+"="); ok && value != "" {
				if err := assign(v, value); err != nil {
					return fmt.Errorf("%w: %s: %s", ErrInvalid, Env(key), err)
				}
			}
		}
	}
	for _, s := range set {
		key, value, ok := strings.Cut(s, "=")
		v, known := leaves[key]
		switch {
		case !ok:
			return fmt.Errorf("%w: %q: want key=value", ErrInvalid, s)
		case !known:
			return fmt.Errorf("%w: unknown key %q, or one that only the file can set", ErrInvalid, key)
		}
		if err := assign(v, value); err != nil {
			return fmt.Errorf("%w: %s: %s", ErrInvalid, key, err)
		}
	}
	return nil
}

// assign reads a value as the file would.
func assign(v reflect.Value, value string) error {
	if v.Kind() == reflect.Slice {
		v.Set(reflect.ValueOf(strings.Split(value, ",")))
		return nil
	}
	if v.Kind() == reflect.String {
		v.SetString(value)
		return nil
	}
	if err := yaml.Unmarshal([]byte(value), v.Addr().Interface()); err != nil {
		return fmt.Errorf("%q is not a %s", value, v.Type())
	}
	return nil
}
