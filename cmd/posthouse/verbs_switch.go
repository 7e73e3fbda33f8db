package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/posthouse/posthouse/cmd/posthouse/internal/admin"
	"github.com/posthouse/posthouse/routing"
)

func switchCommand() *cobra.Command {
	var t target
	var req admin.SwitchRequest
	var plan bool
	var abort, resume string
	var confirmedDown bool
	c := &cobra.Command{
		Use: "switch ROLE --to BACKEND", Short: "Make another backend serve a role",
		Args: func(_ *cobra.Command, args []string) error {
			steers := abort != "" || resume != ""
			if steers && len(args) == 0 || !steers && len(args) == 1 && req.To != "" {
				if confirmedDown && abort == "" {
					return errors.New("--confirmed-down is for --abort")
				}
				return nil
			}
			return errors.New("switch needs ROLE and --to BACKEND, or --abort ROLE, or --resume ROLE")
		},
		Example: "  posthouse switch ma01 --to b --plan\n  posthouse switch ma01 --to b --reason 'new disks in a'\n  posthouse switch --abort ma01",
		Long: "Make another backend serve a role. New logins wait while the sessions on the old backend end in good\n" +
			"order; when every frontend has confirmed that nobody is there any more, the new backend opens. If that\n" +
			"takes longer than limits.switch_budget the switch is aborted and the old backend serves on: exit code 1.\n" +
			"Interrupting this command does not stop the switch; --abort ROLE does. Roles that share a backend which\n" +
			"their hooks restart are switched together.",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			steer := admin.SteerRequest{Role: abort + resume, Who: operator(), Reason: req.Reason, ConfirmedDown: confirmedDown}
			switch {
			case abort != "":
				return client.Abort(cmd.Context(), steer)
			case resume != "":
				return client.Resume(cmd.Context(), steer)
			}
			req.Role, req.Who = args[0], operator()
			if plan {
				p, err := client.Plan(cmd.Context(), req)
				if err != nil {
					return err
				}
				return t.print(cmd.OutOrStdout(), p, func(w io.Writer) { printPlan(w, p) })
			}
			rec, err := client.Switch(cmd.Context(), req, narrate(cmd.ErrOrStderr()))
			return t.ended(cmd, rec, err)
		},
	}
	t.flags(c)
	c.Flags().StringVar(&req.To, "to", "", "the `BACKEND` that shall serve the role")
	c.Flags().StringVar(&req.Reason, "reason", "", "`TEXT` for the history")
	c.Flags().BoolVar(&req.ConfirmedClean, "confirmed-clean", false, confirmedClean)
	c.Flags().BoolVar(&req.AcceptRefusals, "accept-refusals", false, "begin though some logins will find no place to wait and be told to try again")
	c.Flags().BoolVar(&plan, "plan", false, "say what would happen, and change nothing")
	c.Flags().StringVar(&abort, "abort", "", "turn back the switch of `ROLE`")
	c.Flags().BoolVar(&confirmedDown, "confirmed-down", false,
		"with --abort: the new backend, whose promotion has begun, is down and stays down (it is stale then)")
	c.Flags().StringVar(&resume, "resume", "", "let the switch of `ROLE` go on that waits for you")
	c.MarkFlagsMutuallyExclusive("abort", "resume", "to")
	c.MarkFlagsMutuallyExclusive("abort", "resume", "plan")
	return c
}

func printPlan(w io.Writer, p routing.Plan) {
	from := p.From
	if from == "" {
		from = "nobody"
	}
	fmt.Fprintf(w, "switch of %s from %s to %s\n", strings.Join(p.Roles, ", "), from, p.To)
	if p.Refused != "" {
		fmt.Fprintf(w, "REFUSED now: %s\n", p.Refused)
	}
	fmt.Fprintln(w)
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, s := range p.Steps {
		undo := s.Undo
		if undo == "" {
			undo = "nothing to undo"
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\n", s.Phase, s.Does, undo)
	}
	_ = tab.Flush() // to memory
	fmt.Fprintf(w, "\nusers seen since the last switch: %s\n", seenText(p.Seen))
	if p.Compared != "" {
		fmt.Fprintf(w, "comparison: %s\n", p.Compared)
	}
	fmt.Fprintln(w)
	printFrontends(w, p.Frontends)
	for _, f := range p.Frontends {
		if f.Report == nil {
			fmt.Fprintf(w, "%s: no report\n", f.ID)
			continue
		}
		reaches, places := "reaches "+p.To, "all find a place to wait"
		if f.Report.Unreachable != "" {
			reaches = fmt.Sprintf("CANNOT REACH %s: %s", p.To, f.Report.Unreachable)
		}
		if f.Report.Crowded != "" {
			places = "NOT ALL FIND A PLACE TO WAIT: " + f.Report.Crowded
		}
		fmt.Fprintf(w, "%s: %d sessions, %s, %s\n", f.ID, f.Report.Sessions, places, reaches)
	}
	printResidues(w, p.Role, p.Residues)
	for _, c := range p.Caveats {
		fmt.Fprintf(w, "note: %s\n", c)
	}
}

func seenText(s routing.Seen) string {
	if s.All {
		return "unknown, so all of them"
	}
	return fmt.Sprint(len(s.Users))
}

func switchesCommand() *cobra.Command {
	return listCommand("switches", "List the switches in progress and the last that have ended", (*admin.Client).Switches, printSwitches)
}

func printSwitches(w io.Writer, list admin.Switches) {
	for _, rec := range list.Ended {
		end := "opened " + rec.To
		if !rec.Done {
			end = "aborted: " + rec.AbortWhy
		}
		printSwitch(w, rec, fmt.Sprintf("%s after %v", end, rec.Ended.Sub(rec.Started).Round(time.Millisecond)))
	}
	for _, rec := range list.Open {
		state := "IN PROGRESS"
		if rec.Stuck != "" {
			state = "WAITS FOR YOU: " + rec.Stuck
		}
		printSwitch(w, rec, state)
	}
}

func printSwitch(w io.Writer, rec routing.SwitchRecord, state string) {
	roles := rec.Role
	if n := len(rec.Roles) - 1; n > 0 {
		roles += fmt.Sprintf(" (with %d more)", n)
	}
	fmt.Fprintf(w, "%d  %s  %s from %s to %s by %s", rec.Number, clock(rec.Started), roles, rec.From, rec.To, rec.Who)
	if rec.Why != "" {
		fmt.Fprintf(w, " (%s)", rec.Why)
	}
	fmt.Fprintf(w, ": %s\n", state)
	var steps []string
	for n, s := range rec.Steps {
		text := string(s.Phase)
		if n+1 < len(rec.Steps) {
			text += " " + rec.Steps[n+1].At.Sub(s.At).Round(time.Millisecond).String()
		}
		steps = append(steps, text)
	}
	fmt.Fprintf(w, "   %s\n", strings.Join(steps, ", "))
	if rec.Compared != "" {
		fmt.Fprintf(w, "   compared before HOLD: %s\n", rec.Compared)
	}
	for _, run := range rec.Runs {
		fmt.Fprintf(w, "   hook %s\n", run)
	}
}

// narrate prints a switch's progress, one line each.
func narrate(w io.Writer) func(admin.Progress) {
	return func(p admin.Progress) {
		switch {
		case p.Waiting != "":
			fmt.Fprintf(w, "waiting for %s\n", p.Waiting)
		case p.Event != nil:
			if text := tell(*p.Event); text != "" {
				fmt.Fprintln(w, text)
			}
		}
	}
}

// tell is an event of the role table in words; "" if it says nothing to people.
func tell(e routing.Event) string {
	switch e.Kind {
	case routing.EventCompared:
		return fmt.Sprintf("compare  %s and %s of %s: %s", e.Backend, e.To, e.Role, e.Text)
	case routing.EventHeld:
		return fmt.Sprintf("hold     %s: switch %d from %s to %s, new logins wait", e.Role, e.Number, e.Backend, e.To)
	case routing.EventParked:
		return fmt.Sprintf("parked   %s waits for %s", e.User, e.Role)
	case routing.EventRevoked:
		return fmt.Sprintf("drain    %s must leave %s", e.User, e.Backend)
	case routing.EventAcked:
		return fmt.Sprintf("ack      frontend %s has nobody inside %s below epoch %d", e.Frontend, e.Role, e.Epoch)
	case routing.EventPhase:
		return fmt.Sprintf("phase    %s: %s", e.Role, e.Text)
	case routing.EventHook:
		return "hook     " + e.Text
	case routing.EventStuck:
		return fmt.Sprintf("stuck    %s: %s", e.Role, e.Text)
	case routing.EventOpened:
		return fmt.Sprintf("opened   %s on %s, epoch %d", e.Role, e.Backend, e.Epoch)
	case routing.EventAborted:
		return fmt.Sprintf("aborted  %s stays on %s, epoch %d: %s", e.Role, e.Backend, e.Epoch, e.Text)
	case routing.EventResidue:
		return fmt.Sprintf("residue  work of %s may still run on %s: %s", e.User, e.Backend, e.Text)
	case routing.EventDoubt:
		return fmt.Sprintf("doubt    %s: %s", e.Role, e.Text)
	case routing.EventDisagreement:
		return fmt.Sprintf("disagree %s stays in %s: %s", e.User, e.Role, e.Text)
	case routing.EventBuried:
		return fmt.Sprintf("buried   frontend %s ended without a goodbye", e.Frontend)
	case routing.EventLost:
		return fmt.Sprintf("lost     frontend %s is not registered any more", e.Frontend)
	}
	return ""
}

// ended prints how a switch ended, if that is known, and returns err.
func (t *target) ended(cmd *cobra.Command, rec *routing.SwitchRecord, err error) error {
	if rec == nil || err != nil && t.out == "text" {
		return err
	}
	if err == nil {
		for _, c := range rec.Caveats() {
			fmt.Fprintf(cmd.ErrOrStderr(), "note: %s\n", c)
		}
	}
	printErr := t.print(cmd.OutOrStdout(), rec, func(w io.Writer) {
		fmt.Fprintf(w, "%s is on %s in epoch %d; switch %d took %v\n", rec.Role, rec.To, rec.Epochs[rec.Role], rec.Number,
			rec.Ended.Sub(rec.Started).Round(time.Millisecond))
	})
	if err == nil {
		err = printErr
	}
	return err
}
