package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/posthouse/posthouse/cmd/posthouse/internal/admin"
)

func failoverCommand() *cobra.Command {
	var t target
	var req admin.FailoverRequest
	c := &cobra.Command{
		Use: "failover ROLE --to BACKEND", Short: "Make another backend serve a role whose backend is dead", Args: cobra.ExactArgs(1),
		Long: "Make another backend serve a role whose backend is dead. Every frontend must confirm that nobody is on the\n" +
			"old one any more, and the role's fence hook must prove that it is off; --accept-loss goes on without proof.\n" +
			"Replication is asynchronous: mail that the old backend has acknowledged and not yet passed on is not on the\n" +
			"new one. The old one is marked as stale, and serves again only after `posthouse rejoin`.\n" +
			"A switch that is in progress is taken over. If the old backend is alive, use `posthouse switch`.\n" +
			"If the new backend is stale itself, because the old one has died before it could rejoin, --accept-stale opens\n" +
			"it with the mail that it has: what the old one took since is lost, but for what rejoin finds on it later.",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			req.Role, req.Who = args[0], operator()
			rec, err := client.Failover(cmd.Context(), req, narrate(cmd.ErrOrStderr()))
			return t.ended(cmd, rec, err)
		},
	}
	t.flags(c)
	c.Flags().StringVar(&req.To, "to", "", "the `BACKEND` that shall serve the role")
	c.Flags().StringVar(&req.Reason, "reason", "", "`TEXT` for the history")
	c.Flags().BoolVar(&req.AcceptLoss, "accept-loss", false, "the old backend is off, on my word: go on without proof")
	c.Flags().BoolVar(&req.AcceptStale, "accept-stale", false, "the new backend may be stale: what the old one took since is lost")
	c.Flags().BoolVar(&req.ConfirmedClean, "confirmed-clean", false, confirmedClean)
	_ = c.MarkFlagRequired("to") // it is defined above
	return c
}

func rejoinCommand() *cobra.Command {
	var t target
	var req admin.RejoinRequest
	c := &cobra.Command{
		Use: "rejoin ROLE BACKEND", Short: "Make a backend that a failover left behind a copy of the active again", Args: cobra.ExactArgs(2),
		Long: "Make a backend that a failover left behind a copy of the active again: runs the role's rejoin hook, which\n" +
			"may take hours, and then lets the backend become active again. It is for all roles that were left behind there,\n" +
			"unless the hook touches this role only (scope: role). Interrupting this command ends the hook.",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			req.Role, req.Member, req.Who = args[0], args[1], operator()
			done, err := client.Rejoin(cmd.Context(), req)
			if err != nil {
				return err
			}
			return t.print(cmd.OutOrStdout(), done, func(w io.Writer) {
				if done.Output != "" {
					fmt.Fprintln(w, done.Output)
				}
				fmt.Fprintf(w, "%s is a copy of %s again\n", req.Member, strings.Join(done.Roles, ", "))
			})
		},
	}
	t.flags(c)
	c.Flags().StringVar(&req.Reason, "reason", "", "`TEXT` for the log")
	return c
}
