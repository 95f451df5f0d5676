package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/trust"
	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
	"github.com/interlock-fabric/interlock/pkg/session"
)

func newInitCommand(g *globals) *cobra.Command {
	var o trust.InitOptions
	cmd := &cobra.Command{
		Use: "init", Short: "Make a deployment's keys", Args: cli.NoArgs,
		Long: `Makes the root key, the first signing key, the tenants' keys and the first key
set. Nothing is overwritten. The root key signs key sets and nothing else: keep it
off this machine, and bring it for keys and epoch.`,
		Example: `  session-authority init --root /media/usb/root.key --tenant acme --tenant globex`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Validity < 0 || o.Validity > 0 && o.Validity < time.Hour {
				return cli.Usagef("--validity %s is out of range: give at least 1h", o.Validity)
			}
			o.Dir = filepath.Join(g.dataDir, service.KeysDir)
			s, err := trust.Init(o, session.InstantOf(time.Now()))
			if errors.Is(err, session.ErrInvalid) || errors.Is(err, session.ErrMalformed) {
				return cli.Usagef("%w", err)
			}
			if err != nil {
				return err
			}
			root := o.RootPath
			if root == "" {
				root = filepath.Join(o.Dir, trust.RootFile)
			}
			if g.json {
				return cli.PrintJSON(cmd.OutOrStdout(), keySetOf(s))
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "made keys in %s; tenants %s; valid until %s\nthe root key is %s: move it to a safe place, off this machine\n",
				o.Dir, strings.Join(keySetOf(s).Tenants, ", "), s.KeySet().NotAfter.Time().Format(time.DateOnly), root)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.RootPath, "root", "", "where the root key goes; default is in the data directory")
	f.StringArrayVar(&o.Tenants, "tenant", nil, "a tenant; default is one called default; may be repeated")
	f.DurationVar(&o.Validity, "validity", trust.DefaultValidity, "how long the key set counts")
	return cmd
}

// keySet is what keys show prints with --json.
type keySet struct {
	Version  uint64    `json:"version"`
	Epoch    uint64    `json:"epoch"`
	Issued   time.Time `json:"issued"`
	NotAfter time.Time `json:"not_after"`
	Root     string    `json:"root"`
	Tenants  []string  `json:"tenants"`
	Keys     []keyInfo `json:"keys"`
}

type keyInfo struct {
	ID        string `json:"id"`
	Use       string `json:"use"`
	Current   bool   `json:"current,omitempty"`
	Withdrawn bool   `json:"withdrawn,omitempty"`
	// LastEpoch and LastNumber are the last that is trusted of a withdrawn key.
	LastEpoch  uint64 `json:"last_epoch,omitempty"`
	LastNumber uint64 `json:"last_number,omitempty"`
	// Orders is how many an emergency key may sign, of Tenants alone if there are
	// any.
	Orders  uint16   `json:"orders,omitempty"`
	Tenants []string `json:"tenants,omitempty"`
}

func keySetOf(s *trust.Store) keySet {
	ks := s.KeySet()
	out := keySet{
		Version: ks.Version, Epoch: ks.Epoch, Issued: ks.Issued.Time(), NotAfter: ks.NotAfter.Time(),
		Root: session.KeyIDOf(s.Root()).String(),
	}
	for _, t := range ks.Tenants {
		out.Tenants = append(out.Tenants, t.Name)
	}
	current := session.KeyID{}
	if key, err := s.Signer(session.InstantOf(time.Now())); err == nil {
		if pub, ok := key.Public().(ed25519.PublicKey); ok {
			current = session.KeyIDOf(pub)
		}
	}
	sealing, _ := ks.AuditKey()
	for _, k := range ks.Keys {
		use := map[session.KeyUse]string{session.UseWriter: "writer", session.UseEmergency: useEmergency, session.UseAudit: "audit"}[k.Use]
		id := session.KeyIDOf(k.Public)
		info := keyInfo{
			ID: id.String(), Use: use, Current: id == current || bytes.Equal(k.Public, sealing),
			Withdrawn: k.Withdrawn, LastEpoch: k.LastEpoch, LastNumber: k.LastNumber, Orders: k.Orders,
		}
		for _, t := range k.Tenants {
			info.Tenants = append(info.Tenants, ks.TenantName(t))
		}
		out.Keys = append(out.Keys, info)
	}
	return out
}

const useEmergency = "emergency"

// rootChange is a change that the root key signs.
type rootChange func(cmd *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error)

// change makes a change of the key set in the data directory, and has the
// authority that runs on it, if one does, publish it.
func change(cmd *cobra.Command, g *globals, rootPath string, do rootChange) error {
	dir := filepath.Join(g.dataDir, service.KeysDir)
	s, err := trust.Open(dir)
	if err != nil {
		return fmt.Errorf("%w: give --data-dir, or run session-authority init", err)
	}
	if rootPath == "" {
		rootPath = filepath.Join(dir, trust.RootFile)
	}
	r, err := trust.LoadRoot(rootPath)
	if err != nil {
		return fmt.Errorf("%w: give --root", err)
	}
	said, err := do(cmd, s, r, session.InstantOf(time.Now()))
	if errors.Is(err, session.ErrInvalid) {
		return cli.Usagef("%w", err)
	}
	if err != nil {
		return err
	}
	c, err := g.client()
	if err != nil {
		return err
	}
	defer c.Close()
	published := true
	if err := c.PublishKeySet(cmd.Context(), s.Frame()); errors.Is(err, authority.ErrUnreachable) {
		published = false
	} else if err != nil {
		return fmt.Errorf("%s, but it is not published: %w", said, err)
	}
	if g.json {
		return cli.PrintJSON(cmd.OutOrStdout(), struct {
			keySet
			Published bool `json:"published"`
		}{keySetOf(s), published})
	}
	if !published {
		said += "; no authority runs here: it is published when one starts"
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s; key set %d\n", said, s.KeySet().Version)
	return err
}

func newKeysCommand(g *globals) *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use: "keys", Short: "Show, renew, rotate and withdraw keys, and make emergency keys", RunE: cli.Subcommands,
		Long: `Works on the data directory, with the root key. A running authority publishes the
new key set at once; enforcers take it without a restart.`,
	}
	cmd.PersistentFlags().StringVar(&root, "root", "", "the root key; default is in the data directory")

	show := &cobra.Command{
		Use: "show", Short: "Show the key set", Args: cli.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := trust.Open(filepath.Join(g.dataDir, service.KeysDir))
			if err != nil {
				return fmt.Errorf("%w: give --data-dir, or run session-authority init", err)
			}
			k := keySetOf(s)
			if g.json {
				return cli.PrintJSON(cmd.OutOrStdout(), k)
			}
			_, _ = fmt.Fprintf(cmd.OutOrStdout(), "key set %d of root %s; epoch %d; until %s; tenants %s\n",
				k.Version, k.Root, k.Epoch, k.NotAfter.Format(time.RFC3339), strings.Join(k.Tenants, ", "))
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			for _, key := range k.Keys {
				state := "trusted"
				if key.Current {
					state = "current"
				}
				switch {
				case key.Withdrawn && key.Use == useEmergency:
					state = "withdrawn"
				case key.Use == useEmergency && len(key.Tenants) > 0:
					state = fmt.Sprintf("%d orders, for tenant %s", key.Orders, strings.Join(key.Tenants, ", "))
				case key.Use == useEmergency:
					state = fmt.Sprintf("%d orders, for everything", key.Orders)
				case key.Withdrawn:
					state = fmt.Sprintf("withdrawn after seq %d of epoch %d", key.LastNumber, key.LastEpoch)
				}
				_, _ = fmt.Fprintf(w, "%s\t%s\t%s\n", key.ID, key.Use, state)
			}
			return w.Flush()
		},
	}

	var audit bool
	rotate := &cobra.Command{
		Use: "rotate", Short: "Add a signing key and sign with it from now on", Args: cli.NoArgs,
		Long: `Adds a signing key, which is used from now on. The old one stays trusted until it
is withdrawn.

With --audit it is a key to which enforcers seal their reports. Other authorities
need a copy of keys/audit-*.key to read them.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if audit {
				return change(cmd, g, root, func(_ *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error) {
					id, err := s.RotateAudit(r, now)
					return "rotated: reports are sealed to " + id.String(), err
				})
			}
			return change(cmd, g, root, func(_ *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error) {
				id, err := s.Rotate(r, now)
				return "rotated: signing with " + id.String(), err
			})
		},
	}

	rotate.Flags().BoolVar(&audit, "audit", false, "the key to which enforcers seal their reports")

	var validity time.Duration
	renew := &cobra.Command{
		Use: "renew", Short: "Sign the key set anew, before it ends", Args: cli.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if validity < 0 || validity > 0 && validity < time.Hour {
				return cli.Usagef("--validity %s is out of range: give at least 1h", validity)
			}
			return change(cmd, g, root, func(_ *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error) {
				err := s.Renew(r, validity, now)
				return "renewed until " + s.KeySet().NotAfter.Time().Format(time.RFC3339), err
			})
		},
	}
	renew.Flags().DurationVar(&validity, "validity", 0, "how long it counts; default is as long as the one before")

	var epoch, last uint64
	withdraw := &cobra.Command{
		Use: "withdraw KEY-ID", Short: "End the trust in a signing or emergency key", Args: cli.OneArg("the key's id, from keys show"),
		Long: `Ends the trust in a signing key. What it signed up to --last stays in force; without
it, that is all that the running authority knows. If the key may have been used by
others, give the last number that is known to be good.

The orders of an emergency key lose their force at once, but for those that the
authority has adopted: these are decisions, which restore lifts.`,
		Example: "  session-authority keys rotate\n  session-authority keys withdraw 3f2a91c04be7d855",
		RunE: func(cmd *cobra.Command, args []string) error {
			var id session.KeyID
			b, err := hex.DecodeString(args[0])
			if err != nil || len(b) != len(id) {
				return cli.Usagef("%.64q is not a key's id: give 16 hex digits, from session-authority keys show", args[0])
			}
			copy(id[:], b)
			if emergency, err := isEmergency(g, id); err != nil {
				return err
			} else if emergency {
				if cmd.Flags().Changed("last") || cmd.Flags().Changed("epoch") {
					return cli.Usagef("%s is an emergency key: all of its orders lose their force; leave --epoch and --last out", id)
				}
				return change(cmd, g, root, func(_ *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error) {
					return fmt.Sprintf("withdrawn %s: its orders have no force of their own any more", id), s.Withdraw(r, id, s.KeySet().Epoch, 0, now)
				})
			}
			if !cmd.Flags().Changed("last") {
				if cmd.Flags().Changed("epoch") {
					return cli.Usagef("--epoch without --last: give both, or neither for all that is known here")
				}
				c, err := g.client()
				if err != nil {
					return err
				}
				defer c.Close()
				st, err := c.Status(cmd.Context())
				if err != nil {
					return fmt.Errorf("%w, or give --epoch and --last", err)
				}
				epoch, last = st.Epoch, st.Number
			}
			return change(cmd, g, root, func(_ *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error) {
				if epoch == 0 {
					epoch = s.KeySet().Epoch
				}
				err := s.Withdraw(r, id, epoch, last, now)
				return fmt.Sprintf("withdrawn %s after seq %d of epoch %d", id, last, epoch), err
			})
		},
	}
	withdraw.Flags().Uint64Var(&epoch, "epoch", 0, "the epoch of --last; default is the current one")
	withdraw.Flags().Uint64Var(&last, "last", 0, "the last number that is trusted")

	addTenant := &cobra.Command{
		Use: "add-tenant NAME", Short: "Add a tenant", Args: cli.OneArg("the tenant's name"),
		Long: "Adds a tenant with a digest key of its own. Enforcers that shall serve it are\nenrolled anew; other authorities need a copy of keys/tenants.json.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return change(cmd, g, root, func(_ *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error) {
				_, err := s.AddTenant(r, args[0], now)
				return "added tenant " + args[0], err
			})
		},
	}
	cmd.AddCommand(show, rotate, renew, withdraw, addTenant, newEmergencyCommand(g, &root))
	return cmd
}

func newEpochCommand(g *globals) *cobra.Command {
	var root string
	var commit bool
	cmd := &cobra.Command{
		Use: "epoch", Short: "Begin the log anew after it was lost or rolled back", RunE: cli.Subcommands,
	}
	open := &cobra.Command{
		Use: "open", Short: "Open a new epoch", Args: cli.NoArgs,
		Long: `Begins a new chain with a fresh origin. It is for a log that was lost, restored from
a backup, or rolled back, which status says. Enforcers keep what they had in force
until it is lifted by name.`,
		Example: "  session-authority epoch open --root /media/usb/root.key --commit",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !commit {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "would open a new epoch: the log begins anew, with what is in force here; enforcers keep what they had until it is lifted by name; add --commit to do it")
				return errors.Join(err, cli.Exit(exitCommit, nil))
			}
			return change(cmd, g, root, func(_ *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error) {
				err := s.OpenEpoch(r, now)
				return fmt.Sprintf("opened epoch %d", s.KeySet().Epoch), err
			})
		},
	}
	open.Flags().StringVar(&root, "root", "", "the root key; default is in the data directory")
	open.Flags().BoolVar(&commit, "commit", false, "do it")
	cmd.AddCommand(open)
	return cmd
}

// isEmergency reports whether the key set has an emergency key of that id.
func isEmergency(g *globals, id session.KeyID) (bool, error) {
	s, err := trust.Open(filepath.Join(g.dataDir, service.KeysDir))
	if err != nil {
		return false, fmt.Errorf("%w: give --data-dir, or run session-authority init", err)
	}
	return slices.ContainsFunc(s.KeySet().Keys, func(k session.SigningKey) bool {
		return k.Use == session.UseEmergency && session.KeyIDOf(k.Public) == id
	}), nil
}

func newEmergencyCommand(g *globals, root *string) *cobra.Command {
	var o trust.EmergencyOptions
	var ca string
	cmd := &cobra.Command{
		Use: "emergency", Short: "Make a key that kills when no authority answers", Args: cli.NoArgs,
		Long: `Makes an emergency key and writes it to a new file, with which kill --offline signs.
What it may kill, and how many orders it may sign, stands until it is withdrawn. Give
the servers of the bus, so that orders reach enforcers without an authority; without
them it signs files alone. Keep the file as you keep the root key, and where those
are who will need it at night.`,
		Example: `  session-authority keys emergency --tenant acme --orders 3 --out acme.emergency.json --bus tls://bus-1.example:4222 --bus tls://bus-2.example:4222 --bus-ca ca.pem
  session-authority keys emergency --global --orders 2 --out all.emergency.json --bus tls://bus.example:4222`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Path == "" {
				return cli.Usagef("no --out: give a new file for the key")
			}
			if _, err := os.Lstat(o.Path); err == nil {
				return cli.Usagef("--out %s is there already: give a new file", o.Path)
			}
			if ca != "" {
				pem, err := os.ReadFile(ca)
				if err != nil {
					return cli.Usagef("--bus-ca: %w", err)
				}
				o.CAs = string(pem)
			}
			if err := natsfeed.CheckAccess(session.NATSAccess{URLs: o.URLs, CAs: o.CAs}); len(o.URLs) > 0 && err != nil {
				return cli.Usagef("--bus: %w", err)
			}
			return change(cmd, g, *root, func(_ *cobra.Command, s *trust.Store, r *trust.Root, now session.Instant) (string, error) {
				e, err := s.AddEmergency(r, o, now)
				if err != nil {
					return "", err
				}
				return fmt.Sprintf("made emergency key %s for %d orders: %s", e.ID(), e.Orders, o.Path), nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Path, "out", "", "the new file for the key, mode 0600")
	f.StringArrayVar(&o.Tenants, "tenant", nil, "a tenant that it may kill; may be repeated")
	f.BoolVar(&o.Global, "global", false, "it may kill everything, and any tenant")
	f.IntVar(&o.Orders, "orders", 3, fmt.Sprintf("how many orders it may sign, 1 to %d", session.MaxOrders))
	f.StringArrayVar(&o.URLs, "bus", nil, "a server of the bus, tls://host:port or, on loopback, nats://host:port; may be repeated")
	f.StringVar(&ca, "bus-ca", "", "PEM that verifies the servers; default is the system's")
	return cmd
}
