// Command posthouse is a mail frontend: it logs users in, looks up which
// backend serves their role, and splices them to it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker: -X main.version=….
var version = "development"

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	code := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// failure is what a command that was understood has failed with. Every other
// error of cobra's is about the command line.
type failure struct{ error }

func (f failure) Unwrap() error { return f.error }

// execute runs one command line and returns the exit code.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	markFailures(root)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	var failed failure
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &failed):
		fmt.Fprintf(stderr, "posthouse: %v\n", err)
		return exitFailed
	}
	fmt.Fprintf(stderr, "posthouse: %v\nusage: %s\nmore: %s --help\n", err, cmd.UseLine(), cmd.CommandPath())
	return exitUsage
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use: "posthouse COMMAND", Short: "A mail frontend that routes IMAP, POP3 and ManageSieve by a role table",
		Long: "posthouse logs users in, looks up which backend serves their role, and splices them to it.\n\n" +
			"Exit codes: 0 done, 1 failed, 2 wrong usage.",
		SilenceUsage: true, SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error { return errors.New("which command?") },
	}
	root.AddCommand(serveCommand(), checkCommand(), demoCommand(), rolesCommand(), switchCommand(), failoverCommand(), rejoinCommand(), switchesCommand(), frontendsCommand(), fenceCommand(), explainCommand(),
		sessionsCommand(), versionCommand())
	return root
}

// markFailures makes a failure of whatever a subcommand's RunE returns.
func markFailures(c *cobra.Command) {
	for _, sub := range c.Commands() {
		if run := sub.RunE; run != nil {
			sub.RunE = func(cmd *cobra.Command, args []string) error {
				if err := run(cmd, args); err != nil {
					return failure{err}
				}
				return nil
			}
		}
		markFailures(sub)
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this binary", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "posthouse", version)
			return err
		},
	}
}
