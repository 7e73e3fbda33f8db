package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// deadSite is an installation whose backends do not exist: for what is decided
// before a backend is asked.
func deadSite(t testing.TB) *site {
	t.Helper()
	a := backend{host: nextHost(), cert: "a.test", style: "authzid", done: "eof"}
	b := backend{host: nextHost(), cert: "b.test", style: "authzid", done: "eof"}
	return newSite(t, a, b, "u0001")
}

// TestSafety09: a copied state directory is refused, because two processes
// would share one identity.
func TestSafety09CopiedStateDir(t *testing.T) {
	t.Parallel()
	p := startFrontend(t, deadSite(t))
	p.stop(t)
	file := filepath.Join(p.site.stateDir(), "machine-id")
	mine := readFile(t, file)
	must(t, os.WriteFile(file, []byte(strings.Repeat("0", len(strings.TrimSpace(mine)))+"\n"), 0o600))

	p.start(t)
	if said := p.refuses(t); !strings.Contains(said, "machine") || !strings.Contains(said, p.site.stateDir()) {
		t.Errorf("does not say that the state directory is another machine's: %s", said)
	}

	must(t, os.WriteFile(file, []byte(mine), 0o600))
	p.start(t)
	p.ready(t)
}

// TestSafety14: the table vanishes, or an older copy is put in its place. The
// role is in doubt, and nothing is seeded anew from the configuration. Who has
// a snapshot keeps its row: users stay on b, where they were, and no switch
// begins. Who has none lets nobody in, until the operator decides.
func TestSafety14TableGoesBack(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		harm func(t *testing.T, p *posthouse, table string, older []byte)
	}{
		{"removed", func(t *testing.T, _ *posthouse, table string, _ []byte) { must(t, os.Remove(table)) }},
		{"older", func(t *testing.T, _ *posthouse, table string, older []byte) {
			must(t, os.WriteFile(table, older, 0o600))
		}},
		{"emptied", func(t *testing.T, p *posthouse, table string, _ []byte) {
			must(t, os.Truncate(table, 0))
			p.start(t)
			if said := p.refuses(t); !strings.Contains(said, filepath.Base(table)) || !strings.Contains(said, "move it away") {
				t.Errorf("does not say what to do with the damaged table: %s", said)
			}
			must(t, os.Rename(table, table+".damaged"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a, b := newDovecot(t), newDovecot(t)
			p := startFrontend(t, newSite(t, a.backend(), b.backend(), "u0001"))
			table := filepath.Join(p.site.stateDir(), "table.json")
			older, err := os.ReadFile(table)
			must(t, err)
			mustOpen(t, p.switchTo(t, "b"))
			p.stop(t)
			if newer, _ := os.ReadFile(table); bytes.Equal(newer, older) {
				t.Fatal("the switch has not changed the table")
			}

			c.harm(t, p, table, older)
			p.start(t)
			p.ready(t)
			p.mustBeInDoubt(t)
			p.as(t, "u0001").imap(5*time.Second, "LOGOUT")
			// Dovecot's log is written by a process of its own.
			if !becomes(5*time.Second, func() bool { return strings.Contains(b.logText(), "Login: user=<u0001>") }) {
				t.Errorf("u0001 is not on b, where it was:\n%s", b.logText())
			}
			mustFail(t, p.switchTo(t, "a"), "doubt")
			p.stop(t)

			must(t, os.Remove(filepath.Join(p.site.stateDir(), "snapshot"))) // what kept it from being a frontend that knows nothing
			p.start(t)
			p.ready(t)
			p.mustBeInDoubt(t)
			_, err = imapLogin(p.imap(), p.name, "u0001", password, 40*time.Second)
			if err == nil || !strings.Contains(err.Error(), "[UNAVAILABLE]") {
				t.Errorf("a login where nobody knows better: %v", err)
			}

			// An older table names a frontend that has said goodbye since: work
			// of unknown users, until the operator has looked.
			_, stderr, code := p.cli(t, "roles", "init", "ma01", "--active", "b", "--confirmed-clean")
			if code != 0 {
				t.Fatalf("roles init: exit code %d: %s", code, stderr)
			}
			p.mustBeOn(t, "b")
			p.as(t, "u0001").imap(5*time.Second, "LOGOUT")
			if strings.Contains(a.logText(), "Login: user=") {
				t.Errorf("somebody was let in to a, which is not active any more:\n%s", a.logText())
			}
		})
	}
}

// mustBeInDoubt asserts that `posthouse roles` says so.
func (p *posthouse) mustBeInDoubt(t testing.TB) {
	t.Helper()
	if stdout, stderr, _ := p.cli(t, "roles"); !strings.Contains(stdout+stderr, "doubt") {
		t.Errorf("posthouse roles does not speak of doubt: %s%s", stdout, stderr)
	}
}

// TestSafety30: a second frontend that has another address for a backend is
// refused at start; the first is not disturbed.
func TestSafety30OtherAddress(t *testing.T) {
	t.Parallel()
	s := deadSite(t)
	first := startFrontend(t, s)
	was := s.backends["a"]
	moved := was
	moved.host = nextHost()
	s.backends["a"] = moved
	second := newFrontend(t, s)
	second.start(t)
	said := second.refuses(t)
	for _, part := range []string{was.host, s.backends["a"].host} {
		if !strings.Contains(said, part) {
			t.Errorf("the refusal does not name %s: %s", part, said)
		}
	}
	first.mustBeOn(t, "a")
}
