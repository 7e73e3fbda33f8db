package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestProofByHooks: the process of a session on the old active stands still while
// the session is drained. What it has read and not done is a residue, with which
// nothing opens; the shipped demote ends it, or the shipped prove finds that it has
// ended. a is spoken to by TLS, b in the open.
func TestProofByHooks(t *testing.T) {
	t.Parallel()
	t.Run("cyrus", func(t *testing.T) {
		t.Parallel()
		s, a, b := newHookedPair(t, "u0001")
		proofByHooks(t, s, a, b, a.backend(), b.backend())
	})
	t.Run("dovecot", func(t *testing.T) {
		t.Parallel()
		s, a, b := newHookedDovecots(t)
		a.listUsers(t, []string{"u0001"}) // at first nobody knows whose mail has changed
		b.listUsers(t, []string{"u0001"})
		proofByHooks(t, s, a, b, a.backend(), b.backend())
	})
}

// sessionServer can tell which process serves a session, and whether one has come
// to its end: on Cyrus the process goes on to the next.
type sessionServer interface {
	serves(t testing.TB, user string) int
	isEmpty(t testing.TB) bool
}

func (c hookedCyrus) isEmpty(t testing.TB) bool { return len(c.openVisits(t)) == 0 }
func (d hookedDovecot) isEmpty(t testing.TB) bool {
	return !slices.ContainsFunc(d.visits(t), func(v visit) bool { return v.to.IsZero() })
}

func proofByHooks(t *testing.T, s *hookSite, a, b sessionServer, tls, open backend) {
	open.plain = true
	site := newSite(t, tls, open, "u0001")
	site.limits = "hold_window: 60s, drain_timeout: 1s, switch_budget: 55s, entry_rate: 5000" // the test holds hooks
	s.steer(t)
	p := s.drivenBy(t, site, "")
	servers := map[string]sessionServer{"a": a, "b": b}

	for _, move := range []struct{ from, to string }{{"a", "b"}, {"b", "a"}} {
		at := stands(t, p, servers[move.from])
		demoted, demote := s.holds(t, "demote")
		caughtUp, catchUp := s.holds(t, "catch_up")
		ended := p.startSwitch(t, move.to)
		demoted()
		p.mustRest(t, move.from)
		if said := p.verb(t, "switches").said; !strings.Contains(said, "still at work") {
			t.Errorf("prove has not found the process: %s", tail(said, 30))
		}
		if !at.lives() {
			t.Fatal("the process has ended before demote: this run proves nothing")
		}
		demote()
		caughtUp()
		if at.lives() {
			t.Error("demote has not ended the process")
		}
		if r := p.role(t); len(r.Residues) > 0 {
			t.Errorf("demoted, yet residues: %+v", r.Residues)
		}
		catchUp()
		mustOpen(t, <-ended)
		if r := p.mustBeOn(t, move.to); len(r.Residues) > 0 {
			t.Errorf("open, yet residues: %+v", r.Residues)
		}
		w := p.as(t, "u0001")
		if list, _, err := w.imap(5*time.Second, `LIST "" Later`); err != nil || len(list) > 0 {
			t.Errorf("what the process had not done is done on %s: %q, %v", move.to, list, err)
		}
		w.imap(5*time.Second, "LOGOUT")
		w.Close()
	}

	at := stands(t, p, a)
	proving, prove := s.holds(t, "prove")
	demoted, demote := s.holds(t, "demote")
	ended := p.startSwitch(t, "b")
	proving()
	p.mustRest(t, "a")
	must(t, syscall.Kill(at.pid, syscall.SIGCONT))
	within(t, 20*time.Second, "the session, which goes on, comes to its end", func() bool { return a.isEmpty(t) })
	prove()
	demoted()
	if r := p.role(t); len(r.Residues) > 0 {
		t.Errorf("prove has shown that nothing is at work, yet residues: %+v", r.Residues)
	}
	demote()
	mustOpen(t, <-ended)
}

// stands logs u0001 in, stops the process that serves the session, and sends it a
// command.
func stands(t testing.TB, p *posthouse, server sessionServer) standing {
	t.Helper()
	w := p.as(t, "u0001")
	w.ok(t, "SELECT INBOX")
	pid := server.serves(t, "u0001")
	at := standing{pid, since(pid)}
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	t.Cleanup(func() { syscall.Kill(pid, syscall.SIGCONT) })
	must(t, w.say("s1 CREATE Later"))
	return at
}

// standing is a process that was stopped. Its number alone may be another's later.
type standing struct {
	pid   int
	since string
}

func (s standing) lives() bool { return s.since != "" && since(s.pid) == s.since }

// since is when a process was started; empty if it has ended.
func since(pid int) string {
	raw, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	_, rest, _ := strings.Cut(string(raw), ") ")
	fields := strings.Fields(rest) // from the state on, which is number 3: proc(5)
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[22-3]
}

// mustRest asserts that the role has a residue of u0001 on backend, and has not
// gone anywhere.
func (p *posthouse) mustRest(t testing.TB, backend string) {
	t.Helper()
	r := p.role(t)
	if r.Phase == "open" || len(r.Residues) != 1 || r.Residues[0].User != "u0001" || r.Residues[0].Backend != backend {
		t.Errorf("want the residue of u0001 on %s, and no role opened: %+v", backend, r)
	}
}

// serves is the id of the process that serves user's newest session.
func (d hookedDovecot) serves(t testing.TB, user string) int {
	t.Helper()
	pid := 0
	within(t, 5*time.Second, "the log shows a login of "+user, func() bool {
		for line := range strings.Lines(d.logText()) {
			if strings.Contains(line, "Login: user=<"+user+">") {
				_, rest, _ := strings.Cut(line, "mpid=")
				id, _, _ := strings.Cut(rest, ",")
				pid, _ = strconv.Atoi(id)
			}
		}
		return since(pid) != ""
	})
	return pid
}
