package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// drivenBy gives ma01 the shipped hooks too (in the place of promote another, if it
// is not empty), and the instances the real table to ask.
func (s *hookSite) drivenBy(t testing.TB, site *site, promote string) *posthouse {
	t.Helper()
	var hooks []string
	for _, step := range []string{"prove", "demote", "catch_up", "promote", "undo_promote", "undo_demote", "fence", "rejoin"} {
		script := s.script
		if step == "promote" && promote != "" {
			script = promote
		}
		hooks = append(hooks, fmt.Sprintf("%s: [%s, -c, %s, %s]", step, script, s.config, step))
	}
	site.hooks += ", hooks: {" + strings.Join(hooks, ", ") + "}"
	p := startFrontend(t, site)
	for _, conf := range []string{"local.conf", "remote.conf"} {
		s.configure(t, conf, fmt.Sprintf("ask=%s roles -o json -c %s\n", builtPosthouse(t, true), p.conf))
	}
	return p
}

// configure adds lines to the hooks' configuration on one host.
func (s *hookSite) configure(t testing.TB, conf, lines string) {
	t.Helper()
	path := filepath.Join(s.dir, conf)
	writeFile(t, path, readFile(t, path)+lines)
}

// verb runs an operator's verb to its end, whatever that is.
func (p *posthouse) verb(t testing.TB, args ...string) switchResult {
	t.Helper()
	began := time.Now()
	stdout, stderr, code := p.cli(t, args...)
	return switchResult{code, stdout + stderr, time.Since(began)}
}

var (
	asideDir    = regexp.MustCompile(`[^\s"]*/left-over\.[0-9T.]*[0-9]`)
	subjectLine = regexp.MustCompile(`Subject: [^\r\n]*`)
)

// TestFailoverCyrus: a dies with changes that replication has not passed on. b
// serves; a does not come up by itself, for its peer would write over what it
// has; rejoin keeps that, and makes a a copy of b. The switch back compares both
// members as posthouse does.
func TestFailoverCyrus(t *testing.T) {
	t.Parallel()
	users := userNames(5)
	s, a, b := newHookedPair(t, users...)
	site := newSite(t, a.readable(), b.readable(), users...)
	site.hooks = ", catch_up: {type: imap, rate: 0}"
	p := s.drivenBy(t, site, "")
	for _, user := range users {
		must(t, p.as(t, user).append(5*time.Second, "INBOX", "on both"))
	}
	must(t, p.as(t, "u0003").append(5*time.Second, "INBOX", "expunged on a"))
	for folder, user := range map[string]string{"Old": "u0002", "Deleted": "u0005"} {
		p.fill(t, user, folder, "on both, in "+folder)
		within(t, 20*time.Second, folder+" is on b", func() bool {
			w, err := imapLogin(b.look(), b.certName(), user, password, 5*time.Second)
			must(t, err)
			defer w.Close()
			has, err := w.subjects(folder)
			return err == nil && len(has) == 1
		})
	}
	for _, user := range users {
		a.mustReach(t, b, user)
	}
	must(t, syscall.Kill(a.only(t, "sync_client "), syscall.SIGSTOP))
	a.deliverMail(t, "u0001", "only on a")
	a.deliverMail(t, "u0002", "only on a")
	for folder, user := range onlyOnA {
		p.fill(t, user, folder, "only on a, in "+user+"'s folder")
	}
	p.as(t, "u0005").ok(t, "DELETE Deleted")
	p.as(t, "u0003").ok(t, "SELECT INBOX", `STORE 2 +FLAGS (\Deleted)`, "EXPUNGE")
	a.die()

	r := p.verb(t, "failover", "ma01", "--to", "b")
	mustOpen(t, r)
	for _, words := range []string{"a: is stopped: no process of it is left", "what a had acknowledged and not passed on is not on b", "posthouse rejoin ma01 a"} {
		if !strings.Contains(r.said, words) {
			t.Errorf("the failover does not say %q: %v", words, r)
		}
	}
	t.Logf("failover: %v", r.took.Round(time.Millisecond))
	p.mustBeOn(t, "b")
	b.mustBe(t, "master")
	if has := subjectsOf(t, p, "u0001"); !slices.Equal(has, []string{"on both"}) {
		t.Errorf("u0001 finds %q", has)
	}

	s.boot(t, "a")
	within(t, 20*time.Second, "a says why it does not start", func() bool {
		return strings.Contains(readFile(t, filepath.Join(s.dir, "starts")), "does not start: by the role table it is not the active")
	})
	within(t, 20*time.Second, "nothing of a runs", func() bool { return len(a.processes()) == 0 })
	mustFail(t, p.verb(t, "switch", "ma01", "--to", "a"), "stale", "posthouse rejoin")
	b.deliverMail(t, "u0001", "in between") // its UID is that of the message which is on a only
	b.deliverMail(t, "u0004", "in between")
	p.fill(t, "u0004", "Both", "on b, in Both") // made on both: two mailboxes of one name
	p.as(t, "u0002").ok(t, "RENAME Old Renamed")
	must(t, p.as(t, "u0005").append(5*time.Second, "Deleted", "on b, in Deleted"))

	r = p.verb(t, "rejoin", "ma01", "a")
	mustOpen(t, r)
	t.Logf("rejoin: %v", r)
	a.mustBe(t, "replica")
	for _, user := range users {
		b.mustReach(t, a, user)
	}
	mustOpen(t, p.switchTo(t, "a"))
	stdout, _, _ := p.cli(t, "switches")
	if !strings.Contains(stdout, "users compared: 5 equal, 0 not") {
		t.Errorf("both members are not equal: %s", tail(stdout, 60))
	}
	p.mustHaveMerged(t)
	a.mustHaveKept(t, r.said)
}

// onlyOnA are folders, and whose they are, that die with a before they have been
// replicated. u0004 makes a folder of that name again on b. u0001's names would
// lead out of the directory where rejoin keeps them, or be too long for a file's.
var onlyOnA = map[string]string{`"New.One 1"`: "u0003", "Both": "u0004", `"../../escaped"`: "u0001", strings.Repeat("x", 300): "u0001"}

// fill makes a folder with a message.
func (p *posthouse) fill(t testing.TB, user, folder, subject string) {
	t.Helper()
	w := p.as(t, user)
	defer w.Close()
	w.ok(t, "CREATE "+folder)
	must(t, w.append(5*time.Second, folder, subject))
}

// readable is the member as posthouse has to know it to compare it.
func (c hookedCyrus) readable() backend {
	b := c.backend()
	b.done += fmt.Sprintf(", replica: {imap: %q}", c.look()) // done is the last key of a backend
	return b
}

func (c hookedCyrus) deliverMail(t testing.TB, user, subject string) {
	t.Helper()
	l := mustDialLMTP(t, c.lmtp())
	defer l.Close()
	if _, err := l.deliver("a@example.org", []string{user}, "Subject: "+subject+"\r\n\r\n"+subject+"\r\n"); err != nil {
		t.Fatal(err)
	}
}

// mustHaveMerged asserts what README.md says of mailboxes that b had: messages
// that were on a only have come back to them. Of mailboxes that were on a only,
// and of those deleted there, nothing is left; expunges count.
func (p *posthouse) mustHaveMerged(t *testing.T) {
	t.Helper()
	want := map[string]map[string][]string{
		"u0001": {"INBOX": {"in between", "on both", "only on a"}},
		"u0002": {"INBOX": {"on both", "only on a"}, "Renamed": {"on both, in Old"}},
		"u0003": {"INBOX": {"on both"}},
		"u0004": {"INBOX": {"in between", "on both"}, "Both": {"on b, in Both"}},
		"u0005": {"INBOX": {"on both"}, "Deleted": {"on b, in Deleted", "on both, in Deleted"}},
	}
	for user, folders := range want {
		w := p.as(t, user)
		list, _, err := w.imap(5*time.Second, `LIST "" *`)
		must(t, err)
		if len(list) != len(folders) {
			t.Errorf("%s has %q, want %v", user, list, folders)
		}
		for folder, subjects := range folders {
			has, err := w.subjects(folder)
			slices.Sort(has)
			if err != nil || !slices.Equal(has, subjects) {
				t.Errorf("%s finds %q in %s, %v, want %q", user, has, folder, err, subjects)
			}
		}
	}
}

// mustHaveKept asserts what README.md says of that which a had not sent: it is in
// the directory that rejoin names, and what has lost its mailbox is listed.
func (a hookedCyrus) mustHaveKept(t *testing.T, said string) {
	t.Helper()
	aside := asideDir.FindString(said)
	if aside == "" || !strings.Contains(said, fmt.Sprintf("see the file missing: %d\\n", len(onlyOnA))) {
		t.Fatalf("rejoin does not name what it has kept, and how much is missing: %s", said)
	}
	lost := map[string]int{}
	for _, path := range strings.Split(strings.TrimSpace(readFile(t, filepath.Join(aside, "missing"))), "\n") {
		if filepath.Dir(filepath.Dir(path)) != filepath.Join(aside, "box") {
			t.Errorf("kept elsewhere: %q", path)
		}
		lost[subjectLine.FindString(readFile(t, path))]++
	}
	for _, user := range onlyOnA {
		lost["Subject: only on a, in "+user+"'s folder"]--
	}
	for subject, n := range lost {
		if n != 0 {
			t.Errorf("%+d times listed as missing: %q", n, subject)
		}
	}
	for pattern, words := range map[string]string{"log*": "u0002", "box/user.u0001.????????/2.": "only on a", "box/user.u0001.????????/cyrus.index": ""} {
		paths, _ := filepath.Glob(filepath.Join(aside, pattern))
		if !slices.ContainsFunc(paths, func(path string) bool { return strings.Contains(readFile(t, path), words) }) {
			t.Errorf("%s has no %q: %q", pattern, words, paths)
		}
	}
}

// TestFailoverHooks runs fence, the promotion that asks nobody, and rejoin by
// hand. b lives on another host, which is away.
func TestFailoverHooks(t *testing.T) {
	t.Parallel()
	s, a, b := newHookedPair(t, "u0001")
	s.change(t, "a", "b", []string{"u0001"}, nil)
	b.deliver(t, "u0001", "on both")
	b.mustReach(t, a, "u0001")
	s.number++
	fence := call{step: "fence", from: "b", to: "a", number: s.number, attempt: 2}

	stands := b.as(t, "u0001")
	thaw := b.freeze(t, "u0001")
	s.must(t, 0, fence, "by force", "no process of it is left")
	thaw()
	stands.Close()
	if left := b.processes(); len(left) > 0 {
		t.Errorf("fence has left %v", left)
	}
	s.must(t, 0, fence, "no process of it is left")

	down := filepath.Join(s.dir, "down")
	writeFile(t, down, "")
	s.must(t, 1, fence, "cannot be reached, which proves nothing", "Add b.off=COMMAND", "--accept-loss")
	off := filepath.Join(s.dir, "off")
	must(t, os.WriteFile(off, []byte("#!/bin/sh\n[ -e $0.able ] && [ \"$1\" = b ] && echo cut >$0.done\n"), 0o755))
	s.configure(t, "local.conf", "b.off="+off+" %\n")
	s.must(t, 1, fence, "cutting its power", "no proof that it is off")
	writeFile(t, off+".able", "")
	s.must(t, 0, fence, "is off, by b.off")
	must(t, os.Remove(off+".done"))

	promote := call{step: "promote", to: "a", number: s.number, attempt: 2}
	s.must(t, 0, promote, "runs as master")
	master := a.master(t)
	s.must(t, 0, promote, "already")
	if now := a.master(t); now != master {
		t.Errorf("promote restarted the master: %d, then %d", master, now)
	}
	s.tableSays(t, "a", "open")
	a.deliver(t, "u0001", "in between")
	s.must(t, 1, fence, "refused") // a late one cuts nobody's power
	if _, err := os.Stat(off + ".done"); err == nil {
		t.Error("an overtaken fence has cut b's power")
	}

	rejoin := call{step: "rejoin", from: "a", to: "b", number: s.number, attempt: 1}
	s.must(t, 75, rejoin, "cannot be reached")
	must(t, os.Remove(down))
	s.must(t, 0, rejoin, "runs as replica", "all users sent")
	s.number++ // a later switch has made a the active again
	s.must(t, 0, call{step: "promote", to: "a", number: s.number, attempt: 1}, "already")
	s.must(t, 0, rejoin, "nothing was left to send")
	b.mustBe(t, "replica")
	a.mustReach(t, b, "u0001")
	s.must(t, 1, fence, "refused")
	s.must(t, 1, call{step: "rejoin", from: "b", to: "a", number: s.number, attempt: 1}, "is no master")
	a.mustBe(t, "master")
	s.change(t, "a", "b", []string{"u0001"}, nil)
}

// TestFailoverWithoutProof: b is dead with its host. posthouse does not take that
// for proof; the operator's next command goes on from where it stopped.
func TestFailoverWithoutProof(t *testing.T) {
	t.Parallel()
	s, a, b := newHookedPair(t, "u0001")
	site := newSite(t, a.backend(), b.backend(), "u0001")
	site.limits = "drain_timeout: 1s, switch_budget: 12s, undo_reserve: 4s"
	p := s.drivenBy(t, site, "")
	mustOpen(t, p.switchTo(t, "b"))
	must(t, p.as(t, "u0001").append(5*time.Second, "INBOX", "on both"))
	b.mustReach(t, a, "u0001")
	b.die()
	down := filepath.Join(s.dir, "down")
	writeFile(t, down, "")
	ended := make(chan switchResult, 1)
	go func() { ended <- p.verb(t, "failover", "ma01", "--to", "a") }()
	p.mustStick(t, "undo_demote", "b: its host cannot be reached")
	if said := p.verb(t, "switches").said; !strings.Contains(said, "Add b.off=COMMAND") {
		t.Errorf("nobody says what the site must add: %s", said)
	}
	a.mustBe(t, "replica")
	mustOpen(t, p.verb(t, "failover", "ma01", "--to", "a", "--accept-loss"))
	t.Logf("the failover without proof: %v", <-ended)
	p.mustBeOn(t, "a")
	if has := subjectsOf(t, p, "u0001"); !slices.Equal(has, []string{"on both"}) {
		t.Errorf("u0001 finds %q", has)
	}
	must(t, os.Remove(down))
	mustFail(t, p.switchTo(t, "b"), "stale")
	mustOpen(t, p.verb(t, "rejoin", "ma01", "b"))
	mustOpen(t, p.switchTo(t, "b"))
}

// mustStick waits until a switch waits for the operator, and says so.
func (p *posthouse) mustStick(t testing.TB, words ...string) {
	t.Helper()
	within(t, 60*time.Second, "the switch waits for the operator", func() bool {
		said := p.verb(t, "switches").said
		return strings.Contains(said, `"stuck"`) && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(said, w) })
	})
}

// TestStuckUndo: somebody reaches b, past posthouse, between its promotion and
// the undoing. No undo may lose what b took: the switch waits for the operator,
// who does as README.md says.
func TestStuckUndo(t *testing.T) {
	t.Parallel()
	s, a, b := newHookedPair(t, "u0001")
	site := newSite(t, a.backend(), b.backend(), "u0001")
	site.limits = "drain_timeout: 1s, switch_budget: 12s, undo_reserve: 4s"
	promote := filepath.Join(s.dir, "promote-fails")
	must(t, os.WriteFile(promote, []byte("#!/bin/sh\n"+s.script+" \"$@\" || exit\ntouch $0.done\nwhile [ ! -e $0.go ]; do sleep 0.05; done\nexit 1\n"), 0o755))
	p := s.drivenBy(t, site, promote)
	must(t, p.as(t, "u0001").append(5*time.Second, "INBOX", "on both"))
	ended := p.startSwitch(t, "b")
	within(t, 30*time.Second, "b is promoted", func() bool {
		_, err := os.Stat(promote + ".done")
		return err == nil
	})
	b.deliver(t, "u0001", "past posthouse")
	writeFile(t, promote+".go", "")
	p.mustStick(t, "undo_promote", "has taken changes")
	b.mustBe(t, "master")
	a.mustBe(t, "replica")

	b.die()
	out, err := runTool(t, 30*time.Second, nil, lab.syslog.command("setpriv", "--reuid=cyrus", "--regid=mail", "--init-groups",
		cyrusBin+"sync_client", "-C", filepath.Join(b.etc(), "imapd.conf"), "-o", "-A")...)
	if err != nil {
		t.Fatalf("sync_client: %v: %s", err, out)
	}
	must(t, os.Remove(filepath.Join(s.dir, "state-remote", "b.mark")))
	if r := p.verb(t, "switch", "--resume", "ma01"); strings.Contains(r.said, "error") {
		t.Fatalf("resume: %v", r)
	}
	mustFail(t, <-ended, "aborted")
	p.mustBeOn(t, "a")
	a.mustBe(t, "master")
	b.mustBe(t, "replica")
	if has := subjectsOf(t, p, "u0001"); !slices.Equal(has, []string{"on both", "past posthouse"}) {
		t.Errorf("u0001 finds %q", has)
	}
	a.mustReach(t, b, "u0001")
	must(t, os.WriteFile(promote, []byte("#!/bin/sh\nexec "+s.script+" \"$@\"\n"), 0o755))
	mustOpen(t, p.switchTo(t, "b"))
}
