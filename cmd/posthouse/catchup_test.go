package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/backendpool/catchup"
	"github.com/posthouse/posthouse/config"
	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/directory"
	"github.com/posthouse/posthouse/routing/hookrun"
)

// TestRoleConfigWithAComparison: it makes the phase CATCH UP, once, and does not
// by itself switch other roles along.
func TestRoleConfigWithAComparison(t *testing.T) {
	compared := config.CatchUp{Type: config.CatchUpIMAP}
	for name, test := range map[string]struct {
		role  config.Role
		hooks []routing.Hook
		scope routing.Scope
	}{
		"nothing":    {config.Role{}, nil, ""},
		"alone":      {config.Role{CatchUp: compared}, []routing.Hook{routing.HookCatchUp}, routing.ScopeRole},
		"a program":  {config.Role{CatchUp: compared, Hooks: config.Hooks{CatchUp: []string{"/x"}}}, []routing.Hook{routing.HookCatchUp}, ""},
		"a demotion": {config.Role{CatchUp: compared, Hooks: config.Hooks{Demote: []string{"/x"}}}, []routing.Hook{routing.HookDemote, routing.HookCatchUp}, ""},
	} {
		if got := roleConfig(test.role, config.Limits{}); !slices.Equal(got.Hooks, test.hooks) || got.Scope != test.scope {
			t.Errorf("%s: %v, scope %q", name, got.Hooks, got.Scope)
		}
	}
}

// TestEachUser: comments, aliases, spellings, and what only the file knows.
func TestEachUser(t *testing.T) {
	const text = "# all: users\nAlice: ma01 # since: 2020\nbob@example.org:ma02\npostmaster -> alice\na#b : ma01\n\n"
	path := filepath.Join(t.TempDir(), "users.map")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	lower := func(name string) (string, error) { return strings.ToLower(name), nil }
	d, err := directory.NewFile(path, lower)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	err = eachUser(t.Context(), strings.NewReader(text+"carol: ma01\n"), d, lower, func(user, role string) error {
		got = append(got, user+" "+role)
		return nil
	})
	if want := []string{"alice ma01", "bob@example.org ma02", "a#b ma01"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

// TestWhomToCompare: who was seen; if it could be anybody, whom the program
// names; else the directory. That nobody is named is not for want of users.
func TestWhomToCompare(t *testing.T) {
	listed := func(_ context.Context, roles []string) ([]string, error) { return roles, nil }
	all := routing.Seen{All: true}
	for name, test := range map[string]struct {
		c    comparison
		seen routing.Seen
		want string
		err  string
	}{
		"seen":         {comparison{listed: listed}, routing.Seen{Users: []string{"u"}}, "u", ""},
		"nobody":       {comparison{listed: listed}, routing.Seen{}, "", ""},
		"directory":    {comparison{listed: listed}, all, "r1 r2", ""},
		"program":      {comparison{list: []string{"/bin/sh", "-c", `printf 'v\n\n u \nv\n'; echo "$POSTHOUSE_ROLE,$POSTHOUSE_ROLES"`}}, all, "r1,r1 r2 u v", ""},
		"it fails":     {comparison{list: []string{"/bin/sh", "-c", "echo u; exit 3"}}, all, "", "exit status 3"},
		"it has none":  {comparison{list: []string{"/bin/true"}}, all, "", "has no user"},
		"it is absent": {comparison{list: []string{"/nonexistent"}}, all, "", "no such file"},
	} {
		got, err := test.c.users(t.Context(), routing.HookCall{Roles: []string{"r1", "r2"}, Seen: test.seen})
		if strings.Join(got, " ") != test.want || (err != nil) != (test.err != "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// TestPursuit: what a round has found equal is not compared again, though some could
// not be compared in it, or it was cut short: with tens of thousands of users there
// is hardly a round without one.
func TestPursuit(t *testing.T) {
	all := []string{"u1", "u2", "u3", "u4", "u5"}
	away := errors.New("u2: connection reset")
	rounds := []struct {
		want   string
		report catchup.Report
		err    error
		says   string
	}{
		{"u1 u2 u3 u4 u5", catchup.Report{Equal: 2, Unequal: []string{"u2"}, Unasked: []string{"u5", "u4"}}, away,
			"users compared: 2 equal, 1 not, 2 not come to"},
		{"u2 u4 u5", catchup.Report{Unequal: []string{"u2", "u4"}, Refused: []string{"u5"}, Count: 1, Skipped: []string{"quota"}}, away,
			"users compared: 2 equal, 2 not, 1 that both refuse; not compared: quota"},
		{"u2 u4", catchup.Report{Unasked: []string{"u2", "u4"}}, away,
			"users compared: 2 equal, 2 not, 1 that both refuse; not compared: quota"},
		{"u2 u4", catchup.Report{Equal: 2}, nil, "users compared: 4 equal, 0 not, 1 that both refuse; not compared: quota"},
	}
	p := &pursuit{left: all, report: &catchup.Report{}, from: &backendpool.Backend{Name: "a"}, to: &backendpool.Backend{Name: "b"}}
	for n, round := range rounds {
		p.ask = func(_ context.Context, _, _ *backendpool.Backend, users []string) (*catchup.Report, error) {
			if got := strings.Join(users, " "); got != round.want {
				t.Errorf("round %d compares %s, want %s", n, got, round.want)
			}
			return &round.report, round.err
		}
		if err := p.compare(t.Context()); (err != nil) != (round.err != nil) || p.untold != (round.err != nil) {
			t.Errorf("round %d: %v, untold %v", n, err, p.untold)
		}
		if got := p.report.String(); got != round.says {
			t.Errorf("round %d says %q, want %q", n, got, round.says)
		}
	}
	if len(p.left) > 0 {
		t.Errorf("left: %q", p.left)
	}
}

// TestPace: of few users nobody can tell how long many take.
func TestPace(t *testing.T) {
	for users, want := range map[int]time.Duration{paced - 1: 0, paced: 3 * time.Millisecond} {
		p := &pursuit{report: &catchup.Report{}, from: &backendpool.Backend{Name: "a"}, to: &backendpool.Backend{Name: "b"}}
		for i := range users + 100 {
			p.left = append(p.left, fmt.Sprintf("u%06d", i))
		}
		p.ask = func(_ context.Context, _, _ *backendpool.Backend, all []string) (*catchup.Report, error) {
			return &catchup.Report{Equal: users, Unasked: all[users:], Begun: 3 * time.Millisecond * time.Duration(users)}, context.DeadlineExceeded
		}
		_ = p.compare(t.Context())
		if c := p.compared(len(p.left), ""); c.PerUser != want || len(c.Left.Users) != 100 {
			t.Errorf("%d users: %v each, left %d", users, c.PerUser, len(c.Left.Users))
		}
	}
}

// TestMayLag: what may be left for HOLD is some of the users, and never more than
// can be compared there.
func TestMayLag(t *testing.T) {
	for users, want := range map[int]int{1: 100, 2000: 100, 4400: 220, 44_000: 500, 1_000_000: 500} {
		if got := mayLag(users); got != want {
			t.Errorf("of %d users %d may lag, want %d", users, got, want)
		}
	}
}

// TestCatchUpGivesUp: members that cannot be compared are asked again, behind the
// site's program each time, until the time is over; the error says why.
func TestCatchUpGivesUp(t *testing.T) {
	ran := filepath.Join(t.TempDir(), "ran")
	nowhere := func(name string) *backendpool.Backend {
		return &backendpool.Backend{Name: name, Addresses: map[string]string{"imap": "127.0.0.1:1"}, TLS: backendpool.TLSOff, Style: backendpool.StyleAuthzid, User: "proxy"}
	}
	pool := backendpool.New([]*backendpool.Backend{nowhere("a"), nowhere("b")}, backendpool.Limits{ConnectTimeout: time.Second, Logins: 4})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	program := []string{"/bin/sh", "-c", `echo x >>` + ran + `; echo flushed`}
	h := &hooks{
		programs:    &hookrun.Runner{Dir: t.TempDir(), Roles: map[string]hookrun.Commands{"ma01": {routing.HookCatchUp: program}}},
		comparisons: map[string]*comparison{"ma01": {pool: pool, log: zap.NewNop()}},
	}
	go func() {
		for ctx.Err() == nil {
			if times, _ := os.ReadFile(ran); len(times) >= len("x\nx\n") {
				cancel()
			}
			time.Sleep(10 * time.Millisecond) // a real process: there is nothing to wait on
		}
	}()
	call := routing.HookCall{Hook: routing.HookCatchUp, Roles: []string{"ma01"}, From: "a", To: "b", Seen: routing.Seen{Users: []string{"u"}}}
	output, err := h.Run(ctx, call)
	if err == nil || !strings.HasPrefix(err.Error(), "a and b could not be compared: u: connect to backend ") || strings.Contains(err.Error(), "\n") || errors.Is(err, routing.ErrTryAgain) {
		t.Errorf("%v", err)
	}
	if want := "users compared: 0 equal, 1 not"; !strings.HasSuffix(output, want) {
		t.Errorf("%q does not end with %q", output, want)
	}
	// Its own failure is the program's, and the members are not compared then.
	h.programs.Roles["ma01"][routing.HookCatchUp] = []string{"/bin/sh", "-c", "exit 75"}
	if _, err := h.Run(t.Context(), call); !errors.Is(err, routing.ErrTryAgain) {
		t.Errorf("the program asks to be tried again: %v", err)
	}
	// Before HOLD the program does not run, and the switch is refused.
	if _, err := h.Compare(t.Context(), call); err == nil || !strings.Contains(err.Error(), "could not be compared: u: connect to backend ") || !h.Compares("ma01") {
		t.Errorf("before HOLD: %v", err)
	}
	// That rejoin has ended well is not enough: it is a copy if it compares equal.
	call.Hook = routing.HookRejoin
	h.programs.Roles["ma01"][routing.HookRejoin] = []string{"/bin/echo", "rejoined"}
	if output, err := h.Run(t.Context(), call); !strings.HasPrefix(output, "rejoined") || err == nil || !strings.Contains(err.Error(), "could not be compared") {
		t.Errorf("rejoin: %q, %v", output, err)
	}
	// Another hook is the program's alone.
	call.Hook = routing.HookDemote
	h.programs.Roles["ma01"][routing.HookDemote] = []string{"/bin/echo", "demoted"}
	if output, err := h.Run(t.Context(), call); output != "demoted" || err != nil {
		t.Errorf("%q, %v", output, err)
	}
}
