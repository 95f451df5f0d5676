package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

// offlineFlags are the flags of a kill that asks no authority.
type offlineFlags struct {
	offline, fileOnly bool
	key, out          string
	number            uint16
}

const helpOffline = `

When no authority answers, --offline signs the kill with an emergency key (keys
emergency) and publishes it straight to the bus. --out also writes it to a file,
which takes force at an enforcer when it is put into its orders_dir, with the bus
dead or alive. It spares nobody, and stands until the authority is back, has adopted
it and lifts it, or the root withdraws the key. --reason is in your own words then.
Each order is kept beside the key as FILE.order-N: giving N again sends it again.`

func (o *offlineFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&o.offline, "offline", false, "ask no authority: sign with --key, and publish straight to the bus")
	f.StringVar(&o.key, "key", "", "with --offline: the emergency key's file")
	f.Uint16Var(&o.number, "number", 0, "with --offline: the order's number; default is the first that is not used")
	f.StringVar(&o.out, "out", "", "with --offline: a new file that the order is written to, too")
	f.BoolVar(&o.fileOnly, "file-only", false, "with --offline: only write the file")
}

// offlineOnly are the flags that a kill has with --offline; the others that a kill
// has make no sense then.
var offlineOnly = []string{"key", "number", "out", "file-only"}

// check refuses flags that do not go together.
func (o *offlineFlags) check(cmd *cobra.Command) error {
	if !o.offline {
		for _, name := range offlineOnly {
			if cmd.Flags().Changed(name) {
				return cli.Usagef("--%s is for --offline: give both", name)
			}
		}
		return nil
	}
	for _, name := range []string{"idempotency-key", "drill", "break-glass", "wait", "except", "no-exemptions", "credentials", "issuer", "tenant"} {
		if cmd.Flags().Changed(name) {
			return cli.Usagef("--%s does not go with --offline: an order kills, and nothing else", name)
		}
	}
	switch {
	case o.key == "":
		return cli.Usagef("--offline takes --key: the file that keys emergency wrote")
	case o.fileOnly && o.out == "":
		return cli.Usagef("--file-only takes --out: a new file")
	}
	return nil
}

// ordered is what a kill without an authority prints with --json.
type ordered struct {
	Key      string `json:"key"`
	Number   uint16 `json:"number"`
	Kills    string `json:"kills"`
	Incident string `json:"incident"`
	// Servers of the bus have taken it.
	Servers int    `json:"servers"`
	File    string `json:"file"`
	Out     string `json:"out,omitempty"`
	Done    bool   `json:"done"` // false for a preview
}

func (o *offlineFlags) run(cmd *cobra.Command, g *globals, d *decisionFlags, args []string) error {
	key, err := trust.LoadEmergencyKey(o.key)
	if err != nil {
		return cli.Usagef("%w", err)
	}
	order, kills, err := orderOf(key, d, args)
	if err != nil {
		return err
	}
	frame, file, err := o.sign(key, order)
	if err != nil {
		return err
	}
	s, err := session.ParseOrder(frame)
	if err != nil {
		return err
	}
	said := ordered{Key: s.ID.Key.String(), Number: s.Number, Kills: kills, Incident: s.Incident, File: file, Out: o.out}
	bus := !o.fileOnly && len(key.NATS.URLs) > 0
	if !bus && o.out == "" {
		return cli.Usagef("the key has no way onto the bus: give --out, and put the file into each enforcer's orders_dir")
	}
	if !d.commit {
		return errors.Join(o.print(cmd, g, said, fmt.Sprintf("would kill %s by order %d of %d of key %s; add --commit to do it", kills, s.Number, key.Orders, said.Key)), cli.Exit(exitCommit, nil))
	}
	if o.out != "" {
		if _, err := os.Lstat(o.out); err == nil {
			return cli.Usagef("--out %s is there already: give a new file", o.out)
		}
	}
	// The number is used up before anybody hears of it.
	if err := keepOrder(file, frame); err != nil {
		return fmt.Errorf("the order cannot be kept beside the key: %w: copy the key to where you can write", err)
	}
	if o.out != "" {
		if err := trust.WriteOrder(o.out, frame); err != nil {
			return err
		}
	}
	if bus {
		if said.Servers, err = natsfeed.PublishOrder(cmd.Context(), key.NATS, frame); err != nil {
			return cli.Exit(cli.ExitUnreachable, fmt.Errorf("order %d is signed, and the bus cannot be reached: %s: put %s into the orders_dir of each enforcer",
				s.Number, strings.ReplaceAll(err.Error(), "\n", "; "), file))
		}
	}
	said.Done = true
	text := fmt.Sprintf("signed order %d of %d of key %s", s.Number, key.Orders, said.Key)
	if bus {
		text += fmt.Sprintf(", and published it at %d of %d servers of the bus\n%s is killed at every enforcer that hears it, until the authority has adopted the order and lifts it",
			said.Servers, len(key.NATS.URLs), kills)
	}
	if o.out != "" {
		text += fmt.Sprintf("\n%s: put it into the orders_dir of enforcers that the bus does not reach", o.out)
	}
	return o.print(cmd, g, said, text)
}

func (*offlineFlags) print(cmd *cobra.Command, g *globals, said ordered, text string) error {
	if g.json {
		return cli.PrintJSON(cmd.OutOrStdout(), said)
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout(), text)
	return err
}

// orderOf reads the order off the command line.
func orderOf(key *trust.EmergencyKey, d *decisionFlags, args []string) (o session.Order, kills string, err error) {
	switch {
	case len(args) == 1 && args[0] == session.KindGlobal.String():
		if kills = "everything"; !key.Global {
			return o, "", cli.Usagef("the key may kill tenants alone: kill tenant NAME")
		}
	case len(args) == 2 && args[0] == session.KindTenant.String():
		t, ok := key.Tenant(args[1])
		if !ok && key.Global {
			return o, "", cli.Usagef("the key was made before there was a tenant %.64q: kill global", args[1])
		}
		if !ok {
			return o, "", cli.Usagef("the key may not kill tenant %.64q", args[1])
		}
		o.Tenant, kills = t.ID, "tenant "+t.Name
	default:
		return o, "", cli.Usagef("--offline kills global, or tenant NAME")
	}
	if d.incident == "" || d.reason == "" {
		return o, "", cli.Usagef("--offline takes --incident and --reason: the id, and why, in your own words")
	}
	o.Incident, o.Reason, o.Time = d.incident, d.reason, session.InstantOf(time.Now())
	return o, kills, nil
}

// orderFile is where an order is kept.
func orderFile(key string, number uint16) string { return fmt.Sprintf("%s.order-%d", key, number) }

// sign signs the order, under the number given or the first one that is not used.
// The same again under a number that is used is what was signed then.
func (o *offlineFlags) sign(key *trust.EmergencyKey, order session.Order) (frame []byte, file string, err error) {
	order.Number = o.number
	for n := uint16(1); order.Number == 0; n++ {
		_, err := os.Lstat(orderFile(o.key, n))
		switch {
		case n > key.Orders:
			return nil, "", cli.Usagef("all %d orders of the key are used: --number N sends one again, and another key kills again", key.Orders)
		case errors.Is(err, fs.ErrNotExist):
			order.Number = n
		case err != nil:
			return nil, "", err
		}
	}
	file = orderFile(o.key, order.Number)
	if kept, err := os.ReadFile(file); err == nil {
		s, err := session.ParseOrder(kept)
		if err != nil || s.ID.Key != key.ID() || s.Number != order.Number || s.Tenant != order.Tenant || s.Incident != order.Incident {
			return nil, "", cli.Usagef("order %d of the key is another one, in %s: leave --number out", order.Number, filepath.Base(file))
		}
		return kept, file, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, "", err
	}
	if frame, err = key.Sign(order); errors.Is(err, session.ErrInvalid) || errors.Is(err, session.ErrMalformed) {
		return nil, "", cli.Usagef("%w", err)
	}
	return frame, file, err
}

// keepOrder writes what has just been signed, unless it is there.
func keepOrder(file string, frame []byte) error {
	if err := trust.WriteOrder(file, frame); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
