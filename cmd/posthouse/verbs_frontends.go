package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/posthouse/posthouse/cmd/posthouse/internal/admin"
	"github.com/posthouse/posthouse/routing"
)

func frontendsCommand() *cobra.Command {
	return listCommand("frontends", "List the frontends whose acknowledgement a switch needs", (*admin.Client).Frontends, printFrontends)
}

func printFrontends(w io.Writer, list []routing.FrontendStatus) {
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "FRONTEND\tSINCE\tSTATE\tMISSING ACKS")
	for _, f := range list {
		state := "silent"
		switch {
		case f.Own:
			state = "this one"
		case f.Alive:
			state = "alive"
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\t%s\n", f.ID, f.Since.Local().Format(time.DateTime), state, strings.Join(f.Missing, ","))
	}
	_ = tab.Flush() // to memory
}

func fenceCommand() *cobra.Command {
	var t target
	var req admin.FenceRequest
	c := &cobra.Command{
		Use: "fence-frontend ID --confirmed-down", Short: "Say that a silent frontend is down and stays down", Args: cobra.ExactArgs(1),
		Long: "Say that a silent frontend is down and stays down, so that no switch waits for it any more. If it were only\n" +
			"cut off, its sessions would go on beside those on another backend: look first, or switch its machine off.\n" +
			"Work of its users that may still run on the backends is kept as a residue in every role.",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			req.Frontend, req.Who = args[0], operator()
			return client.Fence(cmd.Context(), req)
		},
	}
	t.flags(c)
	c.Flags().BoolVar(&req.ConfirmedDown, "confirmed-down", false, "I have seen that it is down")
	c.Flags().StringVar(&req.Reason, "reason", "", "`TEXT` for the log")
	_ = c.MarkFlagRequired("confirmed-down") // it is defined above
	return c
}
