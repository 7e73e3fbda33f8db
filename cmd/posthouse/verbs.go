package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/user"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/posthouse/posthouse/cmd/posthouse/internal/admin"
	"github.com/posthouse/posthouse/config"
	"github.com/posthouse/posthouse/proxy"
	"github.com/posthouse/posthouse/routing"
)

// format is the value of -o.
type format string

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "text|json" }

func (f *format) Set(s string) error {
	if s != "text" && s != "json" {
		return errors.New("choose text or json")
	}
	*f = format(s)
	return nil
}

// target is what every operator's verb has: which instance, and how to print.
type target struct {
	config, socket string
	out            format
}

func (t *target) flags(c *cobra.Command) {
	t.out = "text"
	c.Flags().StringVarP(&t.config, "config", "c", "", "configuration `FILE` of the instance to ask")
	c.Flags().StringVar(&t.socket, "socket", "", "admin socket `PATH` of the instance to ask (default "+config.Default().Admin.Socket+")")
	c.Flags().VarP(&t.out, "output", "o", "how to print")
	c.MarkFlagsMutuallyExclusive("config", "socket")
}

// client finds the instance's socket.
func (t *target) client() (*admin.Client, error) {
	switch {
	case t.socket != "":
		return admin.NewClient(t.socket), nil
	case t.config != "":
		cfg, err := config.Load(t.config)
		if err != nil {
			return nil, fmt.Errorf("%w\ncorrect the file, or name the instance by --socket PATH", err)
		}
		return admin.NewClient(cfg.Admin.Socket), nil
	}
	return admin.NewClient(config.Default().Admin.Socket), nil
}

// print writes an answer as JSON, or as text writes it.
func (t *target) print(w io.Writer, answer any, text func(io.Writer)) error {
	if t.out == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(answer)
	}
	var b strings.Builder
	text(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

// operator is who goes into a role's history.
func operator() string {
	name := fmt.Sprintf("uid %d", os.Getuid())
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if sudoer := os.Getenv("SUDO_USER"); sudoer != "" && sudoer != name {
		name = sudoer + " as " + name
	}
	return name
}

func rolesCommand() *cobra.Command {
	c := listCommand("roles", "Show which backend serves each role", (*admin.Client).Roles, printRoles)
	c.AddCommand(initCommand())
	return c
}

// listCommand asks a running frontend for what it knows and prints it.
func listCommand[T any](use, short string, ask func(*admin.Client, context.Context) (T, error), show func(io.Writer, T)) *cobra.Command {
	var t target
	c := &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			list, err := ask(client, cmd.Context())
			if err != nil {
				return err
			}
			return t.print(cmd.OutOrStdout(), list, func(w io.Writer) { show(w, list) })
		},
	}
	t.flags(c)
	return c
}

func printRoles(w io.Writer, list []admin.Role) {
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "ROLE\tACTIVE\tEPOCH\tPHASE\tMEMBERS\tSESSIONS\tPARKED\tRESIDUES")
	for _, r := range list {
		active := r.Active
		if active == "" {
			active = "nobody"
		}
		fmt.Fprintf(tab, "%s\t%s\t%d\t%s\t%s\t%d\t%d\t%d\n", r.Role, active, r.Epoch, r.Phase, strings.Join(r.Members, ","),
			r.Inside, r.Parked, len(r.Residues)+len(r.Unhanded))
	}
	_ = tab.Flush() // to memory
	for _, r := range list {
		for _, member := range slices.Sorted(maps.Keys(r.Stale)) {
			fmt.Fprintf(w, "\n%s of %s is stale since switch %d: it cannot become active before `posthouse rejoin %s %s`\n",
				member, r.Role, r.Stale[member].Number, r.Role, member)
		}
		if r.InDoubt {
			fmt.Fprintf(w, "\n%s is in doubt: %s.\n  Find out which backend served last, then: posthouse roles init %s --active BACKEND\n",
				r.Role, r.Doubt.Why, r.Role)
		}
		if q := r.Request; q != nil {
			fmt.Fprintf(w, "\n%s: switch %d to %s by %s, asked for at %s, is being prepared\n", r.Role, q.Number, q.To, q.Who, clock(q.Asked))
		}
		if sw := r.Switch; sw != nil {
			fmt.Fprintf(w, "\n%s: switch %d to %s by %s since %s", r.Role, sw.Number, sw.To, sw.Who, clock(sw.Started))
			if sw.Why != "" {
				fmt.Fprintf(w, " (%s)", sw.Why)
			}
			if len(r.Missing) > 0 {
				fmt.Fprintf(w, ", waits for the ack of %s", strings.Join(r.Missing, ", "))
			}
			if r.Below > 0 {
				fmt.Fprintf(w, ", sessions that still drain here: %d", r.Below)
			}
			fmt.Fprintln(w)
		}
		printResidues(w, r.Role, slices.Concat(r.Residues, r.Unhanded))
	}
}

// mostResidues are printed as text: a switch of a busy role can leave
// thousands.
const mostResidues = 20

func printResidues(w io.Writer, role string, all []routing.Residue) {
	if len(all) == 0 {
		return
	}
	fmt.Fprintf(w, "\nResidues of %s, work that may still run:\n", role)
	for i, r := range all {
		if i == mostResidues {
			fmt.Fprintf(w, "  and %d more (-o json shows all)\n", len(all)-i)
			return
		}
		user := r.User
		if user == "" {
			user = "unknown users"
		}
		fmt.Fprintf(w, "  %s on %s since %s: %s (frontend %s)\n", user, r.Backend, clock(r.Since), r.Why, r.Frontend)
	}
}

const confirmedClean = "I have looked: nothing of the past sessions of the role, and of those that are switched with it, runs on their backends (clears the residues)"

func initCommand() *cobra.Command {
	var t target
	var req admin.InitRequest
	c := &cobra.Command{
		Use: "init ROLE --active BACKEND", Short: "Decide who serves a role that is in doubt", Args: cobra.ExactArgs(1),
		Long: "Decide who serves a role that is in doubt, because the role table was lost or put back to an older\n" +
			"state, or that is not in the table yet. Find out first which backend served last: it has the newest mail.\n" +
			"The role opens when every frontend has confirmed that nobody is inside elsewhere, and no residue is in the way.",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			req.Role, req.Who = args[0], operator()
			rec, err := client.InitRole(cmd.Context(), req, narrate(cmd.ErrOrStderr()))
			return t.ended(cmd, rec, err)
		},
	}
	t.flags(c)
	c.Flags().StringVar(&req.Active, "active", "", "the `BACKEND` that serves the role from now on")
	c.Flags().StringVar(&req.Reason, "reason", "", "`TEXT` for the history")
	c.Flags().BoolVar(&req.ConfirmedClean, "confirmed-clean", false, confirmedClean)
	c.Flags().BoolVar(&req.AcceptStale, "accept-stale", false, "the backend may be stale: it opens with the mail that it has")
	_ = c.MarkFlagRequired("active") // it is defined above
	return c
}

func explainCommand() *cobra.Command {
	var t target
	c := &cobra.Command{
		Use: "explain USER|ADDRESS", Short: "Show every step of the lookup of a user or a recipient, without side effects", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			x, err := client.Explain(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return t.print(cmd.OutOrStdout(), x, func(w io.Writer) { printExplanation(w, x) })
		},
	}
	t.flags(c)
	return c
}

func printExplanation(w io.Writer, x admin.Explanation) {
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(what, format string, args ...any) { fmt.Fprintf(tab, what+"\t"+format+"\n", args...) }
	line("asked", "%s", x.Asked)
	if x.User != "" {
		line("user", "%s", x.User)
		line("directory", "role %s", x.DirectoryRole)
	}
	if x.LastRole != "" {
		line("last seen here", "role %s", x.LastRole)
	}
	if x.OverrideRole != "" {
		line("override", "role %s", x.OverrideRole)
	}
	if x.Disagrees {
		line("disagreement", "the directory names another role than the last one; the last one counts")
	}
	if x.Role != "" {
		line("role", "%s", x.Role)
	}
	if x.Backend != "" {
		var at []string
		for _, service := range slices.Sorted(maps.Keys(x.Addresses)) {
			at = append(at, service+" "+x.Addresses[service])
		}
		line("backend", "%s in epoch %d (%s)", x.Backend, x.Epoch, strings.Join(at, ", "))
	}
	for _, s := range x.Sessions {
		leaving := ""
		if s.Revoked {
			leaving = ", must leave"
		}
		line("session here", "on %s in epoch %d since %s%s", s.Backend, s.Epoch, clock(s.Since), leaving)
	}
	switch {
	case x.Error != "":
		line("a login now", "fails: %s", x.Error)
	case x.Doubt != nil && x.Backend == "":
		line("a login now", "fails: %s", x.Parks)
	case x.Parks != "":
		line("a login now", "waits: %s", x.Parks)
	default:
		line("a login now", "goes to %s", x.Backend)
	}
	_ = tab.Flush() // to memory
	printResidues(w, x.Role, x.Residues)
}

func sessionsCommand() *cobra.Command {
	return listCommand("sessions", "List the connections and what each is doing", (*admin.Client).Sessions, printSessions)
}

func printSessions(w io.Writer, list []proxy.SessionInfo) {
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "SESSION\tPROTOCOL\tCLIENT\tUSER\tROLE\tBACKEND\tSINCE\tUP\tDOWN\tACTION")
	for _, s := range list {
		fmt.Fprintf(tab, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\n", s.ID, s.Protocol, s.Client, orDash(s.User), orDash(s.Role),
			orDash(s.Backend), clock(s.Since), s.Up, s.Down, s.Action)
	}
	_ = tab.Flush() // to memory
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// clock is a point in time as an operator reads it: the day only if it is not
// today.
func clock(at time.Time) string {
	at = at.Local()
	if time.Since(at) < 24*time.Hour && at.Day() == time.Now().Day() {
		return at.Format(time.TimeOnly)
	}
	return at.Format(time.DateTime)
}
