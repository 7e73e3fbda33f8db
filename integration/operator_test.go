package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// What the tests read of the operator's verbs with -o json. Only what is named
// here is relied upon; everything that a test asks of the CLI goes through this
// file.

// roleView is one role in `posthouse roles`.
type roleView struct {
	Role     string        `json:"role"`
	Active   string        `json:"active"`
	Epoch    uint64        `json:"epoch"`
	Phase    string        `json:"phase"`
	Residues []residueView `json:"residues"`
	// Unhanded are those that the frontend asked has not yet put in the table.
	Unhanded []residueView `json:"unhanded"`
}

type residueView struct {
	Backend string `json:"backend"`
	User    string `json:"user"`
	Why     string `json:"why"`
}

// sessionView is one session in `posthouse sessions`.
type sessionView struct {
	User    string `json:"user"`
	Backend string `json:"backend"`
	Action  string `json:"action"`
}

func (p *posthouse) role(t testing.TB) roleView {
	t.Helper()
	return p.rolesNamed(t, "ma01")[0]
}

// rolesNamed are some of the roles, as they were at one moment.
func (p *posthouse) rolesNamed(t testing.TB, names ...string) []roleView {
	t.Helper()
	var roles, found []roleView
	p.ask(t, &roles, "roles")
	for _, name := range names {
		i := slices.IndexFunc(roles, func(r roleView) bool { return r.Role == name })
		if i < 0 {
			t.Fatalf("posthouse roles knows no %s: %+v", name, roles)
		}
		r := roles[i]
		r.Residues = append(r.Residues, r.Unhanded...)
		found = append(found, r)
	}
	return found
}

func (p *posthouse) sessions(t testing.TB) []sessionView {
	t.Helper()
	var sessions []sessionView
	p.ask(t, &sessions, "sessions")
	return sessions
}

// switchResult is how `posthouse switch` ended.
type switchResult struct {
	code int
	said string // stdout and stderr
	took time.Duration
}

func (r switchResult) String() string {
	return fmt.Sprintf("exit code %d after %v:\n%s", r.code, r.took.Round(time.Millisecond), r.said)
}

// switchTo runs the verb to its end, whatever that is.
func (p *posthouse) switchTo(t testing.TB, backend string, flags ...string) switchResult {
	t.Helper()
	began := time.Now()
	stdout, stderr, code := p.cli(t, append([]string{"switch", "ma01", "--to", backend, "--reason", t.Name()}, flags...)...)
	return switchResult{code, stdout + stderr, time.Since(began)}
}

// startSwitch runs the verb in the background.
func (p *posthouse) startSwitch(t testing.TB, backend string, flags ...string) <-chan switchResult {
	t.Helper()
	ended := make(chan switchResult, 1)
	go func() { ended <- p.switchTo(t, backend, flags...) }()
	return ended
}

// mustOpen waits for a switch to succeed.
func mustOpen(t testing.TB, r switchResult) {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("the switch failed: %v", r)
	}
}

// mustFail asserts that a switch did not open, said so with exit code 1, and
// named each of names.
func mustFail(t testing.TB, r switchResult, names ...string) {
	t.Helper()
	if r.code != 1 {
		t.Fatalf("the switch should have failed: %v", r)
	}
	for _, name := range names {
		if !strings.Contains(strings.ToLower(r.said), strings.ToLower(name)) {
			t.Errorf("the answer does not name %q: %v", name, r)
		}
	}
}

// mustBeOn asserts which backend serves the role and that it is open.
func (p *posthouse) mustBeOn(t testing.TB, backend string) roleView {
	t.Helper()
	r := p.role(t)
	if r.Active != backend || r.Phase != "open" {
		t.Fatalf("role ma01 is %s on %s, want open on %s", r.Phase, r.Active, backend)
	}
	return r
}
