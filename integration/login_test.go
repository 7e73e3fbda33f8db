package integration

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestLogin: every protocol, both kinds of TLS, every way to log in that a
// stock client knows, through posthouse to each real server; each does real
// work and logs out.
func TestLogin(t *testing.T) {
	t.Parallel()
	users := userNames(30)
	t.Run("cyrus", func(t *testing.T) {
		pair := newCyrusPair(t, users...)
		p := startFrontend(t, newSite(t, pair.a.backend(), pair.b.backend(), users...))
		t.Run("through", func(t *testing.T) { everyWay(t, p.service(), users, pair.a.deliver) })
		if on := usersOf(pair.b.visits(t)); len(on) > 0 {
			t.Errorf("b is the replica, but its log shows %v", on)
		}
		p.mustBeEmpty(t)
	})
	t.Run("dovecot", func(t *testing.T) {
		a, b := newDovecot(t), newDovecot(t)
		p := startFrontend(t, newSite(t, a.backend(), b.backend(), users...))
		t.Run("through", func(t *testing.T) { everyWay(t, p.service(), users, a.deliver) })
		if strings.Contains(b.logText(), "Login: user=") {
			t.Errorf("b is not active, but its log shows logins:\n%s", tail(b.logText(), 5))
		}
		p.mustBeEmpty(t)
	})
}

// TestLoginReplay: without passwords of its own posthouse logs in with the
// client's, and the backend judges them.
func TestLoginReplay(t *testing.T) {
	t.Parallel()
	users := userNames(30)
	replay := func(be backend) backend {
		be.style = "replay"
		return be
	}
	t.Run("cyrus", func(t *testing.T) {
		pair := newCyrusPair(t, users...)
		s := newSite(t, replay(pair.a.backend()), replay(pair.b.backend()), users...)
		s.auth = "{type: backend}"
		p := startFrontend(t, s)
		t.Run("through", func(t *testing.T) { everyWay(t, p.service(), users, pair.a.deliver) })
	})
	t.Run("dovecot", func(t *testing.T) {
		a, b := newDovecot(t), newDovecot(t)
		s := newSite(t, replay(a.backend()), replay(b.backend()), users...)
		s.auth = "{type: backend}"
		p := startFrontend(t, s)
		t.Run("through", func(t *testing.T) { everyWay(t, p.service(), users, a.deliver) })
	})
}

// TestWrongPassword: each protocol says so in its own words, within the limit
// of tries, and no backend hears of it.
func TestWrongPassword(t *testing.T) {
	t.Parallel()
	a, b := newDovecot(t), newDovecot(t)
	p := startFrontend(t, newSite(t, a.backend(), b.backend(), "u0001"))
	wrong := plain("", "u0001", "wrong")
	for _, c := range []struct{ door, greeting, say, want string }{
		{"imap/implicit", "* OK", "a AUTHENTICATE PLAIN " + wrong, "a NO [AUTHENTICATIONFAILED]"},
		{"imap/implicit", "* OK", "a LOGIN u0001 wrong", "a NO [AUTHENTICATIONFAILED]"},
		{"imap/implicit", "* OK", "a LOGIN nobody wrong", "a NO [AUTHENTICATIONFAILED]"},
		{"pop3/implicit", "+OK", "AUTH PLAIN " + wrong, "-ERR [AUTH]"},
		{"sieve/implicit", "OK", `AUTHENTICATE "PLAIN" "` + wrong + `"`, "NO "},
	} {
		t.Run(c.door+" "+strings.Fields(c.say)[1], func(t *testing.T) {
			w, err := dialWire(p.service().at[c.door], lab.ca.client(p.name))
			must(t, err)
			w.keep(t)
			_, _, err = w.until(5*time.Second, c.greeting)
			must(t, err)
			must(t, w.say("%s", c.say))
			answer, err := w.line(10 * time.Second)
			must(t, err)
			if !strings.HasPrefix(answer, c.want) || strings.Contains(answer, "TRYLATER") {
				t.Errorf("answer %q, want %q", answer, c.want)
			}
		})
	}
	if strings.Contains(a.logText()+b.logText(), "u0001") {
		t.Errorf("a backend was asked:\n%s%s", a.logText(), b.logText())
	}
}

// TestExplainAndSessions: the operator sees who is where, and why.
func TestExplainAndSessions(t *testing.T) {
	t.Parallel()
	a, b := newDovecot(t), newDovecot(t)
	p := startFrontend(t, newSite(t, a.backend(), b.backend(), "u0001", "u0002"))
	p.as(t, "u0001")
	if s := p.sessions(t); len(s) != 1 || s[0].User != "u0001" || s[0].Backend != "a" {
		t.Errorf("sessions: %+v", s)
	}
	stdout, _, code := p.cli(t, "explain", "u0002")
	if code != 0 || !strings.Contains(stdout, "ma01") {
		t.Errorf("explain u0002: exit code %d: %s", code, stdout)
	}
	if s := p.sessions(t); len(s) != 1 {
		t.Errorf("explain had side effects: %+v", s)
	}
	for _, args := range [][]string{{"switch"}, {"switch", "ma01"}, {"nonsense"}, {"switch", "ma01", "--nonsense"}} {
		if _, stderr, code := p.cli(t, args...); code != 2 {
			t.Errorf("posthouse %v: exit code %d, want 2: %s", args, code, stderr)
		}
	}
	for _, args := range [][]string{{"switch", "ma99", "--to", "b"}, {"switch", "ma01", "--to", "z"}} {
		if _, stderr, code := p.cli(t, args...); code != 1 {
			t.Errorf("posthouse %v: exit code %d, want 1: %s", args, code, stderr)
		}
	}
	p.mustBeOn(t, "a")
}

// TestShutdown: SIGTERM ends the sessions as a switch would, and the process
// with exit code 0.
func TestShutdown(t *testing.T) {
	t.Parallel()
	pair := newCyrusPair(t, "u0001", "u0002")
	p := startFrontend(t, newSite(t, pair.a.backend(), pair.b.backend(), "u0001", "u0002"))
	idler, worker := p.as(t, "u0001"), p.as(t, "u0002")
	_, _, err := idler.imap(5*time.Second, "SELECT INBOX")
	must(t, err)
	must(t, idler.say("i IDLE"))
	_, _, err = idler.until(5*time.Second, "+")
	must(t, err)

	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	must(t, idler.farewell(15*time.Second))
	must(t, worker.farewell(15*time.Second))
	p.stop(t)

	// A clean goodbye leaves no residue: the next one may switch at once.
	p.start(t)
	p.ready(t)
	mustOpen(t, p.switchTo(t, "b"))
	p.mustBeOn(t, "b")
	mustNotOverlap(t, pair.a, pair.b)
}

// mustBeEmpty waits until p says that nobody is inside any more.
func (p *posthouse) mustBeEmpty(t testing.TB) {
	t.Helper()
	within(t, 15*time.Second, "the last session has left", func() bool { return len(p.sessions(t)) == 0 })
	if r := p.role(t); len(r.Residues) > 0 {
		t.Errorf("sessions that logged out left residues: %+v", r.Residues)
	}
}

// logged returns how many of users the instance's log has seen.
func (c *cyrus) logged(t testing.TB, users []string) int {
	t.Helper()
	seen, n := usersOf(c.visits(t)), 0
	for _, user := range users {
		if slices.Contains(seen, user) {
			n++
		}
	}
	return n
}
