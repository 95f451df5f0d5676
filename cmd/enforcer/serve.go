package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/gateway"
	"github.com/interlock-fabric/interlock/internal/gateway/config"
)

const helpRunning = `
It runs until SIGTERM or an interrupt: then it stops listening, lets requests end
for drain_timeout, and cuts what is left. SIGHUP reads the configuration again;
nothing that runs is disturbed, and a file that is not valid changes nothing.`

func newProxyCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "proxy", Short: "Run a reverse proxy that enforces", Args: cli.NoArgs,
		Long: `Runs a reverse proxy in front of the upstreams of the configuration's routes.
Every request is checked before its upstream sees anything of it, and cut when
its caller must stop.
` + helpRunning,
		Example: `  enforcer proxy --config /etc/interlock/enforcer.yaml`,
		RunE:    func(cmd *cobra.Command, _ []string) error { return serve(cmd, g, gateway.Proxy) },
	}
}

func newAuthzCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "authz", Short: "Run an authorization service for another proxy", Args: cli.NoArgs,
		Long: `Answers Envoy's ext_authz v3 over gRPC, and the forward-auth requests of nginx
(auth_request), Caddy (forward_auth) and Traefik (ForwardAuth) over HTTP. Each
request is decided when it begins; what runs is not cut, since none of these can
be told to: where that matters, use enforcer proxy.
` + helpRunning,
		Example: `  enforcer authz --config /etc/interlock/enforcer.yaml`,
		RunE:    func(cmd *cobra.Command, _ []string) error { return serve(cmd, g, gateway.Authz) },
	}
}

func serve(cmd *cobra.Command, g *globals, kind gateway.Kind) error {
	// From here on a SIGHUP is for us, however early it comes.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	c, err := g.load()
	if err != nil {
		return err
	}
	log, err := cli.Logger(cmd.ErrOrStderr(), c.Log.Level, c.Log.Format)
	if err != nil {
		return err
	}
	gw, err := gateway.Start(gateway.Options{Config: c, Kind: kind, Version: cli.Version(), Logger: log})
	if err != nil {
		return err
	}
	for {
		select {
		case <-hup:
			c, err := g.load()
			if err != nil {
				gw.ReloadFailed(err)
			} else {
				err = gw.Reload(c)
			}
			if err != nil {
				log.Error("the configuration is not read again; what was in force still is", "error", err)
			} else {
				log.Info("the configuration is in force")
			}
		case err := <-gw.Failed():
			gw.Shutdown(context.Background())
			return err
		case <-cmd.Context().Done():
			log.Info("stopping", "drain_timeout", c.DrainTimeout.String())
			gw.Shutdown(context.Background())
			return nil
		}
	}
}

func newConfigCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "config", Short: "Check the configuration, or print a sample",
		RunE: cli.Subcommands,
	}
	cmd.AddCommand(&cobra.Command{
		Use: "check", Short: "Check the configuration, with its overrides", Args: cli.NoArgs,
		Long: `Checks the configuration file with what the environment and --set override, and
says what is wrong with it, naming the key. Nothing is started.

Every key that is not in a list can be overridden: admin.listen by
INTERLOCK_ADMIN_LISTEN, or by --set admin.listen=…, which goes before. They are:

  ` + strings.Join(config.Keys(), "\n  "),
		Example: `  enforcer config check --config enforcer.yaml`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			if g.json {
				return cli.PrintJSON(cmd.OutOrStdout(), map[string]any{"valid": true, "routes": len(c.Routes), "issuers": len(c.Issuers)})
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is valid: %s, %s\n", g.config, count(len(c.Routes), "route"), count(len(c.Issuers), "issuer"))
			return err
		},
	}, &cobra.Command{
		Use: "sample", Short: "Print a configuration with every key explained", Args: cli.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), config.Sample)
			return err
		},
	})
	return cmd
}
