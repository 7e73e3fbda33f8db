package integration

import (
	"bytes"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// The tests in this file and in safety_state_test.go carry the numbers of the
// executions that the design says posthouse must survive; these need real
// processes.

// pace is a set of limits short enough to see an abort within a test.
const pace = "hold_window: 12s, drain_timeout: 3s, switch_budget: 6s, undo_reserve: 2s"

// TestSafety01 is the one that a naive frontend fails: a client pipelines 400
// COPYs and resets. The gate is empty at once, yet a works on. A switch must
// either wait for the backend's proof or be blocked by a residue; b is never
// opened while a still executes.
func TestSafety01PipelinedThenReset(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		limits string
		plain  bool
	}{
		"cyrus, patient":            {"hold_window: 25s, drain_timeout: 15s, switch_budget: 20s", false}, // waits for proof
		"cyrus, impatient":          {pace, false},                                                       // leaves a residue
		"cyrus, plaintext, patient": {"hold_window: 25s, drain_timeout: 15s, switch_budget: 20s", true},
	} {
		t.Run(name, func(t *testing.T) {
			pair := newCyrusPair(t, "u0001")
			pair.a.stopSync(t) // it would copy to b what a does, all the time
			a, b := pair.a.backend(), pair.b.backend()
			a.plain, b.plain = c.plain, c.plain
			s := newSite(t, a, b, "u0001")
			s.limits = c.limits
			worksOnThenSwitch(t, startFrontend(t, s), pair.a.mailDir())
			mustNotOverlap(t, pair.a, pair.b)
		})
	}
	for name, plain := range map[string]bool{"dovecot": false, "dovecot, plaintext": true} {
		t.Run(name, func(t *testing.T) {
			s1, s2 := newDovecot(t), newDovecot(t)
			a, b := s1.backend(), s2.backend()
			a.plain, b.plain = plain, plain
			p := startFrontend(t, paced(newSite(t, a, b, "u0001")))
			worksOnThenSwitch(t, p, s1.mailDir())
		})
	}
}

func paced(s *site) *site {
	s.limits = pace
	return s
}

// worksOnThenSwitch leaves u0001's backend session busy without a client and
// switches. mail is where a keeps its messages, one file each.
func worksOnThenSwitch(t *testing.T, p *posthouse, mail string) {
	t.Helper()
	w := p.as(t, "u0001")
	pipelineAndReset(t, w)
	atReset := files(t, mail)
	result := p.switchTo(t, "b")
	r := p.role(t)
	atOpen := files(t, mail)
	t.Logf("%d files on a at the reset, %d when the verb ended; %v", atReset, atOpen, result)
	if atOpen == atReset && result.took < time.Second {
		t.Fatal("a had nothing left to do: this run proves nothing")
	}
	switch {
	case r.Phase != "open":
		t.Fatalf("the verb has ended, but the role is in phase %s", r.Phase)
	case r.Active == "b":
		if result.code != 0 {
			t.Errorf("b is open, but the verb failed: %v", result)
		}
		remains(t, 3*time.Second, "a does nothing after OPEN(b)", func() bool { return files(t, mail) == atOpen })
	default:
		mustFail(t, result, "residue")
		if len(r.Residues) == 0 {
			t.Errorf("blocked without a residue in the table: %+v", r)
		}
	}
}

const copies = 400

// pipelineAndReset fills a folder, sends 400 COPYs of it in one go, waits until
// the backend has begun, and resets the connection.
func pipelineAndReset(t testing.TB, w *wire) {
	t.Helper()
	_, _, err := w.imap(5*time.Second, "CREATE Source")
	must(t, err)
	_, _, err = w.imap(5*time.Second, "CREATE Target")
	must(t, err)
	for i := range 60 {
		must(t, w.append(5*time.Second, "Source", fmt.Sprint("message ", i)))
	}
	_, _, err = w.imap(5*time.Second, "SELECT Source")
	must(t, err)
	var batch bytes.Buffer
	for i := range copies {
		fmt.Fprintf(&batch, "c%d COPY 1:* Target\r\n", i)
	}
	_, err = w.Write(batch.Bytes())
	must(t, err)
	_, _, err = w.until(20*time.Second, "c1 OK")
	must(t, err)
	w.reset()
}

// reset ends the connection with a TCP RST, without close_notify.
func (w *wire) reset() {
	conn := w.Conn
	if c, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = c.NetConn()
	}
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

// files counts the regular files below dir: on Cyrus and with Maildir each
// message is one.
func files(t testing.TB, dir string) int {
	n := 0
	filepath.WalkDir(dir, func(_ string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			n++
		}
		return nil // files come and go while we look
	})
	return n
}

// TestBackendsWorkOn shows that the danger of case 1 is real on both servers:
// with no frontend in between, they go on after the client's reset.
func TestBackendsWorkOn(t *testing.T) {
	t.Parallel()
	goesOn := func(t *testing.T, w *wire, mail string) {
		pipelineAndReset(t, w)
		atReset := files(t, mail)
		within(t, 10*time.Second, "messages appear after the reset", func() bool { return files(t, mail) > atReset+100 })
	}
	t.Run("cyrus", func(t *testing.T) {
		pair := newCyrusPair(t, "u0001")
		pair.a.stopSync(t)
		goesOn(t, pair.a.as(t, "u0001"), pair.a.mailDir())
	})
	t.Run("dovecot", func(t *testing.T) {
		d := newDovecot(t)
		goesOn(t, d.as(t, "u0001"), d.mailDir())
	})
}

// TestSafety02: kill -9 of the frontend leaves unknown residue in every role.
// The next process refuses to switch until the operator has looked.
func TestSafety02KilledFrontend(t *testing.T) {
	t.Parallel()
	pair := newCyrusPair(t, "u0001")
	p := startFrontend(t, paced(newSite(t, pair.a.backend(), pair.b.backend(), "u0001")))
	w := p.as(t, "u0001")
	pipelineAndReset(t, w)
	p.kill()

	p.start(t)
	p.ready(t)
	refused := p.switchTo(t, "b")
	mustFail(t, refused, "residue")
	if r := p.mustBeOn(t, "a"); len(r.Residues) == 0 || r.Residues[0].User != "" {
		t.Errorf("want a residue of unknown users, got %+v", r.Residues)
	}
	p.as(t, "u0001").imap(5*time.Second, "LOGOUT") // a serves on

	// The operator looks, and finds no process.
	within(t, 3*time.Minute, "a has finished", func() bool { return len(pair.a.openVisits(t)) == 0 })
	mustOpen(t, p.switchTo(t, "b", "--confirmed-clean"))
	if r := p.mustBeOn(t, "b"); len(r.Residues) > 0 {
		t.Errorf("confirmed clean, yet residues: %+v", r.Residues)
	}
	p.as(t, "u0001").imap(5*time.Second, "LOGOUT")
	mustNotOverlap(t, pair.a, pair.b)
}

// openVisits lists the sessions that the log shows the beginning of only.
func (c *cyrus) openVisits(t testing.TB) []visit {
	t.Helper()
	var open []visit
	for _, v := range c.visits(t) {
		if v.to.IsZero() && v.service != "sieve" {
			open = append(open, v)
		}
	}
	return open
}

// TestSafety04: a process on a stalls with a session in use. The switch does
// not open b; it aborts in time and names what is missing; nobody is refused.
// The residue outlives the switch (case 3) until somebody confirms.
func TestSafety04StalledBackendProcess(t *testing.T) {
	t.Parallel()
	pair := newCyrusPair(t, "u0001", "u0002")
	p := startFrontend(t, paced(newSite(t, pair.a.backend(), pair.b.backend(), "u0001", "u0002")))
	w := p.as(t, "u0001")
	before := p.role(t).Epoch
	thaw := pair.a.freeze(t, "u0001")
	must(t, w.say("s1 CREATE Later"))

	first := p.startSwitch(t, "b")
	within(t, 5*time.Second, "the role is held", func() bool { return p.role(t).Phase == "hold" })
	parked, err := imapLogin(p.imap(), p.name, "u0002", password, 15*time.Second)
	must(t, err) // parked during the hold, admitted by the abort
	parked.keep(t).imap(5*time.Second, "LOGOUT")
	result := <-first
	mustFail(t, result, "u0001")
	if result.took > 9*time.Second {
		t.Errorf("the budget is 6s: %v", result)
	}
	r := p.mustBeOn(t, "a")
	if r.Epoch != before+2 {
		t.Errorf("epoch %d after the abort, want %d", r.Epoch, before+2)
	}
	if len(r.Residues) != 1 || r.Residues[0].User != "u0001" || r.Residues[0].Backend != "a" {
		t.Errorf("residues: %+v", r.Residues)
	}

	mustFail(t, p.switchTo(t, "b"), "residue") // inherited, although this one's acks are clean
	p.mustBeOn(t, "a")

	thaw()
	within(t, 10*time.Second, "the process has ended", func() bool { return len(pair.a.openVisits(t)) == 0 })
	mustOpen(t, p.switchTo(t, "b", "--confirmed-clean"))
	p.mustBeOn(t, "b")
	p.as(t, "u0001").imap(5*time.Second, "LOGOUT")
	mustNotOverlap(t, pair.a, pair.b)
}

// TestSafety12: several frontends share one state directory, and switches are
// asked of all of them at once. The table changes hands one switch at a time,
// all frontends see the same, and the sessions of all are ended.
func TestSafety12SeveralWriters(t *testing.T) {
	t.Parallel()
	pair := newCyrusPair(t, userNames(3)...)
	s := newSite(t, pair.a.backend(), pair.b.backend(), userNames(3)...)
	frontends := []*posthouse{startFrontend(t, s), startFrontend(t, s), startFrontend(t, s)}
	var sessions []*wire
	for i, p := range frontends {
		sessions = append(sessions, p.as(t, userNames(3)[i]))
	}
	before := frontends[0].mustBeOn(t, "a").Epoch
	var ended []<-chan switchResult
	for _, p := range frontends {
		ended = append(ended, p.startSwitch(t, "b"))
	}
	opened := 0
	for _, result := range ended {
		if r := <-result; r.code == 0 {
			opened++
		} else {
			t.Logf("one was told no, which is fine: %v", r)
		}
	}
	if opened == 0 {
		t.Error("none of the three switches opened b")
	}
	for _, w := range sessions {
		must(t, w.farewell(10*time.Second))
	}
	for _, p := range frontends {
		within(t, 5*time.Second, p.name+" sees b", func() bool { r := p.role(t); return r.Active == "b" && r.Phase == "open" })
		if r := p.role(t); r.Epoch != before+1 {
			t.Errorf("%s: epoch %d, want one switch: %d", p.name, r.Epoch, before+1)
		}
	}
	mustNotOverlap(t, pair.a, pair.b)
}

// TestSafety13: a switch needs every frontend. One that is alive but silent keeps
// it from beginning, by name; one that was killed leaves a residue.
func TestSafety13EveryFrontendAcks(t *testing.T) {
	t.Parallel()
	pair := newCyrusPair(t, "u0001", "u0002")
	s := paced(newSite(t, pair.a.backend(), pair.b.backend(), "u0001", "u0002"))
	first, second := startFrontend(t, s), startFrontend(t, s)
	onFirst, onSecond := first.as(t, "u0001"), second.as(t, "u0002")

	must(t, syscall.Kill(second.pid(), syscall.SIGSTOP))
	t.Cleanup(func() { syscall.Kill(second.pid(), syscall.SIGCONT) })
	result := first.switchTo(t, "b")
	must(t, syscall.Kill(second.pid(), syscall.SIGCONT))
	mustFail(t, result, "no report from frontend")
	if result.took > 9*time.Second {
		t.Errorf("the budget is 6s: %v", result)
	}
	first.mustBeOn(t, "a")
	onFirst.imap(5*time.Second, "NOOP") // nobody was revoked

	onFirst.imap(5*time.Second, "LOGOUT")
	onSecond.imap(5*time.Second, "LOGOUT")

	second.as(t, "u0002")
	second.kill()
	mustFail(t, first.switchTo(t, "b"), "residue")
	first.mustBeOn(t, "a")
	within(t, 10*time.Second, "a has finished", func() bool { return len(pair.a.openVisits(t)) == 0 })
	mustOpen(t, first.switchTo(t, "b", "--confirmed-clean"))
	first.mustBeOn(t, "b")
	mustNotOverlap(t, pair.a, pair.b)
}
