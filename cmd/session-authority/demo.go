package main

import (
	"github.com/spf13/cobra"

	"github.com/interlock-fabric/interlock/internal/cli"
	"github.com/interlock-fabric/interlock/internal/demo"
)

func newDemoCommand() *cobra.Command {
	var o demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the fabric at work on this machine, in under half a minute",
		Long: `Starts an authority with its bus, two MCP servers that embed the enforcer (one
of each era of the protocol) and real MCP clients, and shows: allow, revoke in
mid-call, suspend and resume, cascade, global kill and restore, fan-out to a
hundred enforcers, and the bus cut. Everything runs on loopback and in a
temporary folder, and is gone afterwards.

Exit code 0 means that every expectation held, 1 that one did not.`,
		Example: "  session-authority demo\n  session-authority demo --json | jq '.steps[] | select(.ok | not)'",
		Args:    cli.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Fleet < 1 || o.Fleet > 500 {
				return cli.Usagef("--fleet %d is out of range: give 1 to 500", o.Fleet)
			}
			o.Out = cmd.OutOrStdout()
			_, err := demo.Run(cmd.Context(), o)
			return err
		},
	}
	cmd.Flags().BoolVar(&o.JSON, "json", false, "print one object with the steps, each {name, ok, millis}")
	cmd.Flags().IntVar(&o.Fleet, "fleet", 100, "how many enforcers the fan-out opens, 1 to 500")
	return cmd
}
