package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/access"
	"github.com/interlock-fabric/interlock/internal/audit"
	service "github.com/interlock-fabric/interlock/internal/authority"
	"github.com/interlock-fabric/interlock/internal/broker"
	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/issuers"
	"github.com/interlock-fabric/interlock/internal/sequencer"
)

const (
	startTimeout  = 60 * time.Second
	reloadTimeout = 10 * time.Second
)

type serveFlags struct {
	o                                service.Options
	natsCert, natsKey, natsCA        string
	apiCert, apiKey                  string
	cluster                          broker.Cluster
	clusterSecret                    string
	clusterCert, clusterKey, enforCA string
	level, format, access, tokens    string
}

func newServeCommand(g *globals) *cobra.Command {
	s := &serveFlags{}
	cmd := &cobra.Command{
		Use: "serve", Short: "Run an authority", Args: cli.NoArgs,
		Long: `Runs an authority until it is interrupted. By itself it also runs the bus; with
--nats-url it uses a NATS cluster that is there already.

The first start makes the keys, if everything that it listens on is loopback, and
says so; otherwise run session-authority init first. Outside loopback, TLS is
required. The API is on a unix socket that only this user can open, and on TCP, if
--api-listen is given. Who may use it there, by a token of an issuer or by a client
certificate, is in the file that --access names; without one it is whoever has the
bootstrap token in api.token.

SIGHUP reads the files of --access, --tokens and --api-tls-cert again, and those that
they name. What cannot be read leaves everything as it was.`,
		Example: `  session-authority serve
  session-authority serve --data-dir /var/lib/interlock --nats-listen 10.0.0.5:4222 \
    --nats-tls-cert bus.pem --nats-tls-key bus.key --enforcer-ca ca.pem`,
		RunE: func(cmd *cobra.Command, _ []string) error { return serve(cmd, g, s) },
	}
	f := cmd.Flags()
	f.StringVar(&s.o.NATSListen, "nats-listen", "127.0.0.1:4222", "host:port of the embedded bus; empty serves no enforcers")
	f.StringVar(&s.natsCert, "nats-tls-cert", "", "certificate of the embedded bus, PEM")
	f.StringVar(&s.natsKey, "nats-tls-key", "", "its key, PEM")
	f.StringVar(&s.o.NATSURL, "nats-url", "", "use this bus instead: nats://host:port, several with commas between")
	f.StringVar(&s.o.NATSCreds, "nats-creds", "", "credentials file for --nats-url; default is the authority's NKey")
	f.StringVar(&s.natsCA, "nats-ca", "", "PEM that verifies --nats-url; default is the system's")
	f.IntVar(&s.o.Replicas, "replicas", 0, "replicas of the streams; default 1, or 3 in a cluster")
	f.StringVar(&s.cluster.Name, "cluster-name", "", "make the embedded bus a server of this cluster")
	f.StringVar(&s.cluster.ServerName, "cluster-server", "", "this server's name in the cluster")
	f.StringVar(&s.cluster.Listen, "cluster-listen", "", "host:port for the cluster's other servers")
	f.StringArrayVar(&s.cluster.Routes, "cluster-route", nil, "host:port of another server; may be repeated")
	f.StringVar(&s.clusterSecret, "cluster-secret-file", "", "file with the secret that the servers share, mode 0600")
	f.StringVar(&s.clusterCert, "cluster-tls-cert", "", "certificate for routes, PEM; verified by --nats-ca on both sides")
	f.StringVar(&s.clusterKey, "cluster-tls-key", "", "its key, PEM")
	f.StringArrayVar(&s.o.EnforcerURLs, "enforcer-url", nil, "how enforcers reach the bus; default is its own address; may be repeated")
	f.StringVar(&s.enforCA, "enforcer-ca", "", "PEM by which enforcers verify the bus; goes into enrolments")
	f.StringVar(&s.o.APIListen, "api-listen", "", "host:port for the API on TCP, as in 127.0.0.1:8470")
	f.StringVar(&s.apiCert, "api-tls-cert", "", "certificate of the API, PEM")
	f.StringVar(&s.apiKey, "api-tls-key", "", "its key, PEM")
	f.StringVar(&s.o.MetricsListen, "metrics-listen", "", "host:port for Prometheus /metrics, open to whoever can reach it, as in 127.0.0.1:9470")
	f.StringVar(&s.access, "access", cli.Env("INTERLOCK_ACCESS", ""), "file that says who may use the API, YAML (INTERLOCK_ACCESS)")
	f.StringVar(&s.tokens, "tokens", cli.Env("INTERLOCK_TOKENS", ""), "file that says how callers' tokens are verified, for RFC 7009 and RFC 7662, YAML (INTERLOCK_TOKENS)")
	f.DurationVar(&s.o.SegmentEvery, "segment-every", sequencer.DefaultSegmentEvery, "how often the state is published for those who start; the log is trimmed behind the third newest")
	f.Uint64Var(&s.o.SegmentBatches, "segment-batches", sequencer.DefaultSegmentBatches, "batches of the log that do not wait for --segment-every")
	f.DurationVar(&s.o.CanaryEvery, "canary-every", 10*time.Second, "how often a canary session is revoked, to see that every enforcer denies it; 0 is never")
	f.DurationVar(&s.o.RevokeTarget, "revoke-target", service.DefaultRevokeTarget, "how soon after a decision every enforcer shall deny: status holds the canaries against it")
	f.DurationVar(&s.o.AuditFor, "audit-for", audit.DefaultKeepFor, "how long records of the audit are kept")
	f.Uint64Var(&s.o.AuditBytes, "audit-bytes", audit.DefaultKeepBytes, "how many bytes of them; the oldest give way")
	f.StringArrayVar(&s.o.Tenants, "tenant", nil, "a tenant to make at the first start; default is one called default; may be repeated")
	f.StringArrayVar(&s.o.Issuers, "issuer", issuersInUse(), "a token issuer in use; the only one is the default of targets; may be repeated (INTERLOCK_ISSUER)")
	f.StringVar(&s.level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&s.format, "log-format", "text", "text or json")
	return cmd
}

func issuersInUse() []string {
	if v := os.Getenv("INTERLOCK_ISSUER"); v != "" {
		return []string{v}
	}
	return nil
}

// load reads the files that can be read again.
func (s *serveFlags) load() (r service.Reloaded, err error) {
	if r.APITLS, err = certificate("api-tls", s.apiCert, s.apiKey); err != nil {
		return r, err
	}
	if s.access != "" {
		if r.Access, err = access.Load(s.access); err != nil {
			return r, cli.Usagef("--access: %w", err)
		}
	}
	if s.tokens != "" {
		if r.Tokens, err = issuers.LoadTokens(s.tokens); err != nil {
			return r, cli.Usagef("--tokens: %w", err)
		}
	}
	return r, nil
}

func serve(cmd *cobra.Command, g *globals, s *serveFlags) error {
	// From here on a SIGHUP is for us, however early it comes.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	log, err := cli.Logger(cmd.ErrOrStderr(), s.level, s.format)
	if err != nil {
		return err
	}
	if s.o.SegmentEvery <= 0 || s.o.SegmentBatches == 0 {
		return cli.Usagef("--segment-every and --segment-batches must be more than nothing")
	}
	if s.o.CanaryEvery != 0 && s.o.CanaryEvery < time.Second {
		return cli.Usagef("--canary-every must be a second at least, or 0")
	}
	if s.o.RevokeTarget <= 0 {
		return cli.Usagef("--revoke-target must be more than nothing")
	}
	if s.o.AuditFor < 24*time.Hour || s.o.AuditBytes < 16<<20 {
		return cli.Usagef("--audit-for must be 24h at least, and --audit-bytes %d", 16<<20)
	}
	o := s.o
	o.DataDir, o.Socket, o.Version, o.Logger = g.dataDir, g.socket, cli.Version(), log
	if o.NATSURL != "" && !cmd.Flags().Changed("nats-listen") {
		o.NATSListen = ""
	}
	if o.NATSTLS, err = certificate("nats-tls", s.natsCert, s.natsKey); err != nil {
		return err
	}
	files, err := s.load()
	if err != nil {
		return err
	}
	o.Access, o.Tokens, o.APITLS = files.Access, files.Tokens, files.APITLS
	if s.natsCA != "" && o.NATSURL != "" {
		if o.NATSClientTLS, err = verifyBy("nats-ca", s.natsCA); err != nil {
			return err
		}
	}
	if s.enforCA != "" {
		pem, err := os.ReadFile(s.enforCA)
		if err != nil {
			return cli.Usagef("--enforcer-ca: %w", err)
		}
		o.EnforcerCAs = string(pem)
	}
	if s.cluster.Name != "" {
		if o.Cluster, err = s.clusterOptions(); err != nil {
			return err
		}
	}
	start, cancel := context.WithTimeout(cmd.Context(), startTimeout)
	a, err := service.Open(start, o)
	cancel()
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: give a --data-dir that this user can write, or an address that it may listen on", err)
	}
	if err != nil {
		return err
	}
	for {
		select {
		case <-hup:
			files, err := s.load()
			if err != nil {
				a.ReloadFailed(err)
			} else {
				again, cancel := context.WithTimeout(cmd.Context(), reloadTimeout)
				err = a.Reload(again, files)
				cancel()
			}
			if err != nil {
				log.Error("the files are not read again; what was in force still is", "error", err)
			} else {
				log.Info("the files are in force")
			}
		case <-cmd.Context().Done():
			log.Info("stopping")
			return a.Close()
		}
	}
}

func certificate(flag, cert, key string) (*tls.Config, error) {
	return keyPair(flag+"-cert", flag+"-key", cert, key)
}

// keyPair loads a certificate and its key; nil where neither is given.
func keyPair(certFlag, keyFlag, cert, key string) (*tls.Config, error) {
	if cert == "" && key == "" {
		return nil, nil
	}
	if cert == "" || key == "" {
		return nil, cli.Usagef("--%s and --%s go together: give both", certFlag, keyFlag)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, cli.Usagef("--%s: %w: give a certificate and its key in PEM", certFlag, err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}, nil
}

func verifyBy(flag, path string) (*tls.Config, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, cli.Usagef("--%s: %w", flag, err)
	}
	c := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, cli.Usagef("--%s: %s has no certificate: give PEM", flag, path)
	}
	return c, nil
}

func (s *serveFlags) clusterOptions() (*broker.Cluster, error) {
	c := s.cluster
	info, err := os.Stat(s.clusterSecret)
	if err != nil {
		return nil, cli.Usagef("--cluster-secret-file: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, cli.Usagef("--cluster-secret-file %s can be read by others: chmod 600 it", s.clusterSecret)
	}
	b, err := os.ReadFile(s.clusterSecret)
	if err != nil {
		return nil, cli.Usagef("--cluster-secret-file: %w", err)
	}
	c.Secret = strings.TrimSpace(string(b))
	if c.TLS, err = certificate("cluster-tls", s.clusterCert, s.clusterKey); err != nil || c.TLS == nil {
		return &c, err
	}
	if s.natsCA == "" {
		return nil, cli.Usagef("a cluster over TLS verifies both sides: give --nats-ca")
	}
	ca, err := verifyBy("nats-ca", s.natsCA)
	if err != nil {
		return nil, err
	}
	c.TLS.RootCAs, c.TLS.ClientCAs, c.TLS.ClientAuth = ca.RootCAs, ca.RootCAs, tls.RequireAndVerifyClientCert
	return &c, nil
}

func newEnrollCommand(g *globals) *cobra.Command {
	var r authorityEnroll
	cmd := &cobra.Command{
		Use: "enroll NAME", Short: "Give an enforcer its identity", Args: cli.OneArg("the enforcer's name"),
		Long: `Makes an enforcer's identity, enters it in the roster, and prints the enrolment:
the root key that it pins, its keys, and the digest keys of the tenants that it
serves. It is full of secrets and is shown this once: keep it in a file of mode
0600, on the enforcer's machine alone.`,
		Example: `  session-authority enroll tools-eu-1 --out tools-eu-1.json
  session-authority enroll tools-eu-1 --tenant acme | ssh tools-eu-1 'umask 077; cat > /etc/interlock.json'`,
		RunE: func(cmd *cobra.Command, args []string) error { return r.run(cmd, g, args[0]) },
	}
	f := cmd.Flags()
	f.StringArrayVar(&r.tenants, "tenant", nil, "a tenant that it serves; default is all; may be repeated")
	f.StringArrayVar(&r.urls, "bus-url", nil, "how it reaches the bus; default is what the authority says; may be repeated")
	f.StringVar(&r.out, "out", "", "write to this new file, with mode 0600, instead of printing")
	return cmd
}

func newRetireCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "retire NAME", Short: "Take an enforcer out of the roster and off the bus", Args: cli.OneArg("the enforcer's name"),
		Long: `Takes an enforcer out of the roster, so that coverage counts without it, and off
the bus at once: it hears nothing more, and denies everything when its state is
older than its bound. Its name can be enrolled again.`,
		Example: `  session-authority retire tools-eu-1`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.Retire(cmd.Context(), args[0]); err != nil {
				return err
			}
			if g.json {
				return cli.PrintJSON(cmd.OutOrStdout(), map[string]string{"retired": args[0]})
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "retired", args[0])
			return err
		},
	}
}
