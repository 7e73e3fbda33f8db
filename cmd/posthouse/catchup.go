package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/backendpool/catchup"
	"github.com/posthouse/posthouse/config"
	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/hookrun"
)

// comparePause is the pause between two comparisons.
const comparePause = 500 * time.Millisecond

// hooks are the site's programs and, in CATCH UP and behind a rejoin, the
// built-in comparison.
type hooks struct {
	programs    *hookrun.Runner
	comparisons map[string]*comparison // by role
}

var (
	_ routing.Hooks    = (*hooks)(nil)
	_ routing.Comparer = (*hooks)(nil)
)

// Compares says whether the site wants the members of a role compared.
func (h *hooks) Compares(role string) bool { return h.comparisons[role] != nil }

// A comparison while mail comes in goes over those again that lag. Some may be
// left for HOLD, where nothing comes in and the catch_up program brings over
// what lags; if too many are, replication itself is behind. However many users
// there are, no more may be left than HOLD has the time for: 500 take 5 s at the
// default rate, with two logins each.
const (
	openRounds = 4
	openPause  = time.Second
	mostLag    = 500
)

func mayLag(users int) int { return min(max(100, users/20), mostLag) }

// Compare compares the members while they are being used, without the site's
// program.
func (h *hooks) Compare(ctx context.Context, call routing.HookCall) (found routing.Compared, err error) {
	c := h.comparisons[call.Roles[0]]
	if call.From == "" {
		return routing.Compared{Left: call.Seen, Found: "not compared: nobody knows the old active"}, nil
	}
	users, err := c.users(ctx, call)
	if err != nil {
		return found, fmt.Errorf("list the users to compare: %w", err)
	}
	p := c.pursue(call.From, call.To, users)
	for round := range openRounds {
		if round > 0 {
			pause(ctx, openPause)
		}
		if err = p.compare(ctx); err == nil || ctx.Err() != nil {
			break
		}
	}
	switch {
	case err == nil:
		return p.compared(len(users), ""), nil
	case ctx.Err() != nil || p.untold || len(p.left) > mayLag(len(users)):
		return found, fmt.Errorf("%w (%s)", err, p.report)
	}
	return p.compared(len(users), "; those are compared again in HOLD"), nil
}

// rejoinRounds is how often those are compared again who differ behind a rejoin.
// Replication goes on, and the active is being used.
const rejoinRounds = 60

// rejoin runs the site's program and compares everybody behind it: the member is
// a copy once each user has been equal.
func (h *hooks) rejoin(ctx context.Context, call routing.HookCall) (output string, err error) {
	if output, err = h.programs.Run(ctx, call); err != nil {
		return output, err
	}
	c := h.comparisons[call.Roles[0]]
	users, err := c.users(ctx, call)
	if err != nil {
		return output, fmt.Errorf("list the users to compare: %w", err)
	}
	p := c.pursue(call.From, call.To, users)
	for round := range rejoinRounds {
		if round > 0 {
			pause(ctx, openPause)
		}
		if err = p.compare(ctx); err == nil || ctx.Err() != nil || p.untold && round+1 >= openRounds {
			break
		}
	}
	return joined(output, p.report.String()), err
}

// Run runs the site's program. In CATCH UP, where the first role wants it, both
// members are compared behind that, by turns with it, until they are equal; or
// until ctx ends: then the error names what differs, and so does the switch that
// is aborted for it. With routing.ErrTryAgain, which only the program returns, the
// switch would say that it took too long. A member that rejoins is compared too,
// with an active that is being used.
func (h *hooks) Run(ctx context.Context, call routing.HookCall) (output string, err error) {
	if call.Hook == routing.HookRejoin && h.Compares(call.Roles[0]) {
		return h.rejoin(ctx, call)
	}
	if call.Hook != routing.HookCatchUp || len(call.Roles) == 0 || h.comparisons[call.Roles[0]] == nil {
		return h.programs.Run(ctx, call)
	}
	c := h.comparisons[call.Roles[0]]
	var p *pursuit
	logged := ""
	for {
		said := ""
		if len(h.programs.Roles[call.Roles[0]][routing.HookCatchUp]) > 0 {
			if said, err = h.programs.Run(ctx, call); err != nil && (p == nil || ctx.Err() == nil) {
				return said, err
			}
		}
		if call.From == "" {
			return joined(said, "not compared: nobody knows the old active"), nil
		}
		if p == nil {
			users, err := c.users(ctx, call)
			if err != nil {
				return said, fmt.Errorf("list the users to compare: %w", err)
			}
			p = c.pursue(call.From, call.To, users)
		}
		err := p.compare(ctx)
		output = joined(said, p.report.String())
		if err == nil || ctx.Err() != nil {
			return output, err
		}
		if said := err.Error(); said != logged {
			c.log.Info("the members are not equal yet", zap.Uint64("switch", call.Number), zap.Error(err))
			logged = said
		}
		pause(ctx, comparePause)
	}
}

func joined(some ...string) string {
	return strings.Join(slices.DeleteFunc(some, func(s string) bool { return s == "" }), "\n")
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// comparison is how a role's members are compared. It can be used at any time:
// nothing of it needs a switch.
type comparison struct {
	pool    *backendpool.Pool
	options catchup.Options
	list    []string // the program that prints all users; empty: listed is asked
	// listed returns all users of roles, by the directory.
	listed func(ctx context.Context, roles []string) ([]string, error)
	log    *zap.Logger
}

// comparisons are those of all roles that want one.
func (i *instance) comparisons(d routing.Directory) map[string]*comparison {
	all := make(map[string]*comparison)
	for name, role := range i.cfg.Roles {
		if role.CatchUp.Type != config.CatchUpIMAP {
			continue
		}
		all[name] = &comparison{
			pool: i.pool, options: catchup.Options{Parallel: role.CatchUp.Parallel, PerSecond: float64(role.CatchUp.Rate)},
			list: role.CatchUp.Users, log: i.log,
			listed: func(ctx context.Context, roles []string) ([]string, error) { return i.usersOf(ctx, d, roles) },
		}
	}
	return all
}

// users are those whose mail may have changed.
func (c *comparison) users(ctx context.Context, call routing.HookCall) (users []string, err error) {
	switch {
	case !call.Seen.All:
		return call.Seen.Users, nil
	case len(c.list) > 0:
		users, err = printed(ctx, c.list, call.Roles)
	default:
		users, err = c.listed(ctx, call.Roles)
	}
	if err == nil && len(users) == 0 {
		err = fmt.Errorf("anybody's mail may have changed, and role %s has no user", strings.Join(call.Roles, ", "))
	}
	return users, err
}

// pursuit compares users over and over; those that were equal once are not
// compared again.
type pursuit struct {
	ask      func(ctx context.Context, from, to *backendpool.Backend, users []string) (*catchup.Report, error)
	from, to *backendpool.Backend
	missing  error // there is no such backend
	left     []string
	report   *catchup.Report // of all rounds
	differed error           // what the last round said that came to its end
	untold   bool            // the last round could not compare somebody
	pace     time.Duration   // for each user of the first round, if they were enough to tell
}

// paced is of how many users the pace is told by.
const paced = 200

// compared is what is left of so many users, and what more is said of them.
func (p *pursuit) compared(users int, more string) routing.Compared {
	return routing.Compared{Left: routing.Seen{Users: p.left}, Found: p.report.String() + more, Users: users, PerUser: p.pace}
}

// pursue begins a comparison of users on two backends. What it knows of
// credentials that were accepted must not be older than what it says of users
// that are refused: one pursuit is for one occasion.
func (c *comparison) pursue(from, to string, users []string) *pursuit {
	p := &pursuit{ask: catchup.New(c.pool, c.options).Compare, left: users, report: &catchup.Report{}}
	var known [2]bool
	p.from, known[0] = c.pool.Backend(from)
	p.to, known[1] = c.pool.Backend(to)
	if known != [2]bool{true, true} {
		p.missing = fmt.Errorf("%s or %s is not in this frontend's configuration", from, to)
	}
	return p
}

// compare does one round. The error names what differs or could not be told, on
// one line; if ctx ends before all is done, what the last whole round found.
func (p *pursuit) compare(ctx context.Context) error {
	if p.missing != nil {
		p.untold = true
		return p.missing
	}
	round, failed := p.ask(ctx, p.from, p.to, p.left)
	if asked := len(p.left) - len(round.Unasked); asked >= paced && p.pace == 0 {
		p.pace = round.Begun / time.Duration(asked)
	}
	p.untold = failed != nil
	differs := round.Err()
	p.left = slices.Sorted(slices.Values(slices.Concat(round.Unequal, round.Unasked)))
	p.add(round)
	if differs == nil && failed == nil {
		return nil
	}
	if ctx.Err() == nil || p.differed == nil {
		verdict := "could not be compared"
		if differs != nil {
			verdict = "differ"
		}
		p.differed = fmt.Errorf("%s and %s %s: %s", p.from.Name, p.to.Name, verdict, oneLine(differs, failed))
	}
	return p.differed
}

// add completes the report. What an earlier round has said of those whom this one has
// not come to stands.
func (p *pursuit) add(round *catchup.Report) {
	var unasked []string
	for _, user := range round.Unasked {
		if _, was := slices.BinarySearch(p.report.Unequal, user); was {
			round.Unequal = append(round.Unequal, user)
		} else {
			unasked = append(unasked, user)
		}
	}
	slices.Sort(round.Unequal)
	round.Unasked = unasked
	round.Equal += p.report.Equal
	round.Refused = append(round.Refused, p.report.Refused...)
	round.Skipped = slices.Compact(slices.Sorted(slices.Values(append(round.Skipped, p.report.Skipped...))))
	p.report = round
}

// oneLine puts errors, of which each may be many, on one line of bounded length.
func oneLine(errs ...error) string {
	const most = 1000
	text := strings.ReplaceAll(errors.Join(errs...).Error(), "\n", "; ")
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}

// printed runs a program that prints users, and ends it, with what it has
// started, when ctx ends.
func printed(ctx context.Context, argv, roles []string) ([]string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "POSTHOUSE_ROLE="+roles[0], "POSTHOUSE_ROLES="+strings.Join(roles, " "))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", argv[0], err)
	}
	var users []string
	for line := range strings.Lines(string(out)) {
		if user := strings.TrimSpace(line); user != "" {
			users = append(users, user)
		}
	}
	slices.Sort(users)
	return slices.Compact(users), nil
}

// usersOf lists the users of roles, sorted. Their names come from the
// directory's files; whose they are, is decided as for a login.
func (i *instance) usersOf(ctx context.Context, d routing.Directory, roles []string) (users []string, err error) {
	select {
	case <-i.built: // a switch may go on before this frontend has all its parts
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	moved := i.table.Snapshot().Overrides
	for _, file := range i.directories {
		f, err := os.Open(file.Path())
		if err != nil {
			return nil, err
		}
		err = eachUser(ctx, f, d, normalizer(i.cfg).Normalize, func(user, role string) error {
			remembered, err := i.state.Recall(user)
			if slices.Contains(roles, cmp.Or(moved[user], remembered, role)) { // as a login finds it
				users = append(users, user)
			}
			return err
		})
		_ = f.Close() // it was only read
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file.Path(), err)
		}
	}
	slices.Sort(users)
	return slices.Compact(users), nil
}

// comment is what directory.File takes for one: # in a name is part of it.
var comment = regexp.MustCompile(`(^|[ \t])#.*`)

// eachUser calls do for each user of d that a line of r begins with.
func eachUser(ctx context.Context, r io.Reader, d routing.Directory, normalise func(string) (string, error), do func(user, role string) error) error {
	scanner := bufio.NewScanner(r)
	for scanner.Scan() {
		line := comment.ReplaceAllString(scanner.Text(), "")
		colon := strings.LastIndexByte(line, ':') // a role has none
		if colon < 0 {
			continue // an alias, or nothing
		}
		name, err := normalise(strings.TrimSpace(line[:colon]))
		if err != nil {
			continue // an alias to a name with a colon
		}
		entry, err := d.Lookup(ctx, name)
		if errors.Is(err, routing.ErrUnknownUser) {
			continue // new in the file: in use from the next reload on
		}
		if err == nil {
			err = do(entry.User, entry.Role)
		}
		if err != nil {
			return err
		}
	}
	return scanner.Err()
}
