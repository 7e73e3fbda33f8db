package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// hookedCyrus is a Cyrus instance laid out with the shipped templates.
type hookedCyrus struct{ *cyrus }

// newHookedPair lays a pair out and starts both as their hosts do at boot: a is
// the active by the table, b has no part in it.
func newHookedPair(t testing.TB, users ...string) (s *hookSite, a, b hookedCyrus) {
	t.Helper()
	ahost, bhost := nextHost(), nextHost()
	a, b = newHookedCyrus(t, ahost, bhost), newHookedCyrus(t, bhost, ahost)
	s = newHookSite(t, "cyrus/posthouse-cyrus", a.etc(), b.etc(), "")
	s.boot(t, "a")
	s.boot(t, "b")
	a.mustBe(t, "master")
	b.mustBe(t, "replica")
	a.createUsers(t, users...)
	for _, user := range users {
		a.mustReach(t, b, user)
	}
	return s, a, b
}

func newHookedCyrus(t testing.TB, host, peer string) hookedCyrus {
	t.Helper()
	c := hookedCyrus{newCyrus(t, host, peer)}
	must(t, os.Mkdir(c.etc(), 0o755))
	expand := strings.NewReplacer("@REALM@", "cyrus.test", "@DATA@", c.dir, "@DIR@", c.etc(), "@NAME@", c.prefix, "@ADDRESS@", host,
		"@PEER@", peer, "@PASSWORD@", password)
	for _, name := range []string{"imapd.conf", "imapd-replica.conf", "cyrus-master.conf", "cyrus-replica.conf"} {
		text := readFile(t, filepath.Join(lab.repo, "deploy/cyrus/instance", name))
		if name == "imapd.conf" { // what only a laboratory wants
			text += "allowplaintext: yes\nauditlog: yes\nduplicatesuppression: no\nfailedloginpause: 0s\n"
		}
		writeFile(t, filepath.Join(c.etc(), name), expand.Replace(text))
	}
	t.Cleanup(func() { c.die() })
	return c
}

// die ends the instance as a power failure would.
func (c hookedCyrus) die() {
	becomes(10*time.Second, func() bool {
		left := c.processes()
		for _, p := range left {
			syscall.Kill(p.pid, syscall.SIGKILL)
		}
		return len(left) == 0
	})
}

func (c hookedCyrus) etc() string          { return filepath.Join(c.dir, "etc") }
func (c hookedCyrus) processes() []process { return processesOf(c.dir) }

// look is the replica's address for reading.
func (c hookedCyrus) look() string { return c.host + ":1143" }

// mustBe asserts what part the instance plays, by its ports: what a replica
// must not take it does not even listen for.
func (c hookedCyrus) mustBe(t testing.TB, part string) {
	t.Helper()
	wants := map[string]bool{":143": part == "master", ":993": part == "master", ":110": part == "master", ":4190": part == "master",
		":24": part == "master", ":2005": part == "replica", ":1143": part == "replica"}
	var wrong []string
	if !becomes(10*time.Second, func() bool {
		wrong = nil
		for port, want := range wants {
			if accepts(c.host+port) != want {
				wrong = append(wrong, port)
			}
		}
		return len(wrong) == 0
	}) {
		t.Fatalf("%s is no %s: ports %v; processes %v", c.prefix, part, wrong, c.processes())
	}
}

// only is the id of the instance's process whose command line has this in it. It may
// be about to start.
func (c hookedCyrus) only(t testing.TB, command string) (id int) {
	t.Helper()
	within(t, 10*time.Second, c.prefix+" has a "+command, func() bool {
		for _, p := range c.processes() {
			if id == 0 && strings.Contains(p.command, command) {
				id = p.pid
			}
		}
		return id != 0
	})
	return id
}

// master is the id of the instance's master.
func (c hookedCyrus) master(t testing.TB) int { return c.only(t, cyrusBin+"master ") }

var uidItem = regexp.MustCompile(`UID (\d+)`)

// contents is what user's INBOX holds, as the instance shows it on address:
// UIDVALIDITY, UIDNEXT and each message's UID and subject.
func (c hookedCyrus) contents(address, user string) ([]string, error) {
	w, err := imapLogin(address, c.certName(), user, password, 5*time.Second)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	untagged, _, err := w.imap(5*time.Second, "STATUS INBOX (UIDVALIDITY UIDNEXT HIGHESTMODSEQ)")
	if err != nil {
		return nil, err
	}
	all := slices.Clone(untagged)
	if _, _, err = w.imap(5*time.Second, "EXAMINE INBOX"); err != nil {
		return nil, err
	}
	untagged, _, err = w.imap(10*time.Second, "UID FETCH 1:* (UID FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
	for _, line := range untagged {
		if uidItem.MatchString(line) || strings.HasPrefix(line, "Subject: ") {
			all = append(all, line)
		}
	}
	return all, err
}

// mustReach waits until b shows what a, the master, has of user.
func (a hookedCyrus) mustReach(t testing.TB, b hookedCyrus, user string) {
	t.Helper()
	var has, want []string
	var err error
	if !becomes(20*time.Second, func() bool {
		if want, err = a.contents(a.imap(), user); err == nil {
			has, err = b.contents(b.look(), user)
		}
		return err == nil && slices.Equal(has, want)
	}) {
		t.Fatalf("%s's mail on %s did not reach %s: %v\n%q\n%q", user, a.prefix, b.prefix, err, want, has)
	}
}

// TestCyrusHooks runs the hooks that we ship, with the templates that we ship, by
// hand against real pairs.
func TestCyrusHooks(t *testing.T) {
	t.Parallel()
	t.Run("cycle", cyrusHooksCycle)
	t.Run("backlog", cyrusHooksBacklog)
	t.Run("proof", cyrusHooksProof)
	t.Run("undo demote", cyrusHooksUndoDemote)
	t.Run("undo promote", cyrusHooksUndoPromote)
	t.Run("overtaken", cyrusHooksOvertaken)
	t.Run("forced command", cyrusHooksForcedCommand)
	t.Run("start", cyrusHooksStart)
	t.Run("driven", cyrusHooksDriven)
}

// cyrusHooksCycle: six switches to and fro. Each begins with mail that was
// acknowledged the moment before; everything of it is on the new master, with
// the same UIDs, and nobody gets in to the old one.
func cyrusHooksCycle(t *testing.T) {
	users := userNames(8)
	s, a, b := newHookedPair(t, users...)
	took := map[string][]time.Duration{}
	from, to, old, next := "a", "b", a, b
	for range 6 {
		deliverMany(t, old.lmtp(), 5, users...)
		old.deliver(t, users[0], "appended just now")
		var want [][]string
		for _, user := range users {
			all, err := old.contents(old.imap(), user)
			must(t, err)
			want = append(want, all)
		}
		wrong := func() []string { return nil }
		for step, d := range s.change(t, from, to, users, func() { wrong = watchClosed(old.host) }) {
			took[step] = append(took[step], d)
		}
		next.mustBe(t, "master")
		old.mustBe(t, "replica")
		for i, user := range users {
			all, err := next.contents(next.imap(), user)
			must(t, err)
			if !slices.Equal(all, want[i]) {
				t.Fatalf("%s on %s:\n%q\nwant\n%q", user, to, all, want[i])
			}
		}
		deliverMany(t, next.lmtp(), 1, users[0])
		next.mustReach(t, old, users[0]) // replication has turned round
		if open := wrong(); len(open) > 0 {
			t.Errorf("%s took connections after demote: %v", from, open)
		}
		from, to, old, next = to, from, next, old
	}
	logTook(t, took)

	t.Run("idempotent", func(t *testing.T) {
		a.mustBe(t, "master")
		s.number++
		s.must(t, 0, call{step: "demote", from: "a", to: "b", number: s.number, attempt: 1, users: users})
		replica := a.master(t)
		s.must(t, 0, call{step: "demote", from: "a", to: "b", number: s.number, attempt: 1, users: users}, "already")
		if now := a.master(t); now != replica {
			t.Errorf("demote restarted the replica: %d, then %d", replica, now)
		}
		s.must(t, 0, call{step: "catch_up", from: "a", to: "b", number: s.number, attempt: 1})
		s.must(t, 0, call{step: "catch_up", from: "a", to: "b", number: s.number, attempt: 1, users: []string{}})
		s.must(t, 0, call{step: "promote", from: "a", to: "b", number: s.number, attempt: 1, users: users})
		master := b.master(t)
		s.must(t, 0, call{step: "promote", from: "a", to: "b", number: s.number, attempt: 1, users: users}, "already")
		if now := b.master(t); now != master {
			t.Errorf("promote restarted the master: %d, then %d", master, now)
		}
	})
}

// cyrusHooksBacklog: rolling replication stands still, so that all depends on
// catch_up. Each of its sources suffices by itself: the sync log, the users that
// posthouse names, and all users if it can name none.
func cyrusHooksBacklog(t *testing.T) {
	s, a, b := newHookedPair(t, "u0001")
	for _, conf := range []string{"local.conf", "remote.conf"} {
		path := filepath.Join(s.dir, conf)
		writeFile(t, path, readFile(t, path)+"catch_up_all=yes\n")
	}
	from, to, old, next := "a", "b", a, b
	for _, round := range []struct {
		users   []string
		loseLog bool
	}{{[]string{}, false}, {[]string{"u0001"}, true}, {nil, true}} {
		rolling := old.only(t, "sync_client ")
		must(t, syscall.Kill(rolling, syscall.SIGSTOP))
		deliverMany(t, old.lmtp(), 5, "u0001")
		want, err := old.contents(old.imap(), "u0001")
		must(t, err)
		s.change(t, from, to, round.users, func() {
			logs, err := filepath.Glob(filepath.Join(old.dir, "conf/sync/log*"))
			if err != nil || len(logs) == 0 {
				t.Errorf("there is no backlog: %v %v", logs, err)
			}
			for _, log := range logs {
				if round.loseLog {
					must(t, os.Remove(log))
				}
			}
		})
		if has, err := next.contents(next.imap(), "u0001"); err != nil || !slices.Equal(has, want) {
			t.Fatalf("with the users %q: %v\n%q\nwant\n%q", round.users, err, has, want)
		}
		from, to, old, next = to, from, next, old
	}
}

// cyrusHooksProof: prove finds whoever is still at work, also in the services
// that cyr_info does not list; demote ends them, also one that stands still.
func cyrusHooksProof(t *testing.T) {
	s, a, b := newHookedPair(t, "u0001", "u0002")
	s.number++
	a.demoteWantsItsPeer(t, s, call{step: "demote", from: "a", to: "b", number: s.number, attempt: 1})
	s.number++
	prove := call{step: "prove", from: "a", to: "b", number: s.number, attempt: 1}
	s.finally(t, 0, prove)
	for _, port := range []string{":110", ":24", ":4190", ":143"} {
		w, err := dialWire(a.host+port, nil)
		must(t, err)
		_, err = w.line(5 * time.Second)
		must(t, err)
		s.must(t, 75, prove, "still at work")
		w.Close()
		within(t, 5*time.Second, "nobody is at work on "+port, func() bool { return s.call(t, prove).code == 0 })
	}
	gone := a.as(t, "u0001")
	thaw := a.freeze(t, "u0001")
	gone.Close()
	s.must(t, 75, prove, "imapd[")
	idle := a.as(t, "u0002")
	end := s.must(t, 0, call{step: "demote", from: "a", to: "b", number: s.number, attempt: 1}, "by force")
	t.Logf("demote of an instance with a process that stands still: %v", end.took.Round(time.Millisecond))
	thaw()
	a.mustBe(t, "replica")
	if _, err := idle.line(5 * time.Second); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("u0002's session is still there: %v", err)
	}
	w, err := imapLogin(a.look(), a.certName(), "u0001", password, 5*time.Second)
	must(t, err)
	defer w.Close()
	if err := w.append(5*time.Second, "INBOX", "no"); !errors.Is(err, errRefused) {
		t.Errorf("the replica takes an APPEND: %v", err)
	}
	s.must(t, 0, call{step: "prove", from: "a", to: "b", number: s.number + 1, attempt: 1}) // nothing but a replica there
	b.mustBe(t, "replica")
}

// demoteWantsItsPeer: the running sync_client sends to the sync_host that it read
// at its start. If that may be another one than demote counts on, nobody is stopped.
func (a hookedCyrus) demoteWantsItsPeer(t testing.TB, s *hookSite, demote call) {
	t.Helper()
	master, rolling, conf := a.master(t), a.only(t, "sync_client "), filepath.Join(a.etc(), "imapd.conf")
	must(t, os.Chtimes(conf, time.Time{}, time.Now()))
	s.must(t, 1, demote, "has changed since sync_client")
	a.mustBe(t, "master")
	if now := a.master(t); now != master {
		t.Errorf("a was restarted: %d, then %d", master, now)
	}
	must(t, syscall.Kill(rolling, syscall.SIGTERM))
	within(t, 10*time.Second, "master starts another", func() bool {
		return slices.ContainsFunc(a.processes(), func(p process) bool { return p.pid != rolling && strings.Contains(p.command, "sync_client ") })
	})
}

// cyrusHooksUndoDemote: b dies during a switch. a serves again, and what the
// catch-up could not send reaches b when that is back.
func cyrusHooksUndoDemote(t *testing.T) {
	s, a, b := newHookedPair(t, "u0001", "u0002")
	s.number++
	must(t, syscall.Kill(a.only(t, "sync_client "), syscall.SIGSTOP))
	deliverMany(t, a.lmtp(), 3, "u0001")
	s.must(t, 0, call{step: "demote", from: "a", to: "b", number: s.number, attempt: 1})
	b.die()
	writeFile(t, filepath.Join(s.dir, "down"), "")
	s.must(t, 75, call{step: "catch_up", from: "a", to: "b", number: s.number, attempt: 1, users: []string{"u0001"}}, "could not be sent")
	s.must(t, 75, call{step: "promote", from: "a", to: "b", number: s.number, attempt: 1}, "cannot be reached")
	s.must(t, 75, call{step: "undo_promote", from: "a", to: "b", number: s.number, attempt: 1}, "cannot be reached")
	s.must(t, 0, call{step: "undo_demote", from: "a", to: "b", number: s.number, attempt: 1}, "going on without it")
	a.mustBe(t, "master")
	deliverMany(t, a.lmtp(), 1, "u0002") // whose mailbox alone will not do
	must(t, os.Remove(filepath.Join(s.dir, "down")))
	s.boot(t, "b")
	b.mustBe(t, "replica")
	a.mustReach(t, b, "u0002")
	a.mustReach(t, b, "u0001")
	hangs := filepath.Join(s.dir, "hangs") // b's host answers, and ends nothing
	writeFile(t, hangs, "")
	s.must(t, 0, call{step: "undo_demote", from: "a", to: "b", number: s.number, attempt: 1}, "already", "going on without it")
	must(t, os.Remove(hangs))
	s.change(t, "a", "b", []string{"u0001"}, nil)
}

// cyrusHooksUndoPromote: a promotion can be undone as long as nobody has been
// on the new master, and not afterwards: that would lose what it took.
func cyrusHooksUndoPromote(t *testing.T) {
	s, a, b := newHookedPair(t, "u0001")
	step := func(name string) call {
		return call{step: name, from: "a", to: "b", number: s.number, attempt: 1, users: []string{"u0001"}}
	}
	begin := func() {
		s.number++
		for _, name := range []string{"demote", "catch_up", "promote"} {
			s.must(t, 0, step(name))
		}
		b.mustBe(t, "master")
	}
	begin()
	s.finally(t, 0, step("undo_promote"))
	s.must(t, 0, step("undo_promote"), "already")
	b.mustBe(t, "replica")
	a.mustBe(t, "replica")
	s.must(t, 0, step("undo_demote"))
	a.mustBe(t, "master")
	deliverMany(t, a.lmtp(), 2, "u0001")
	a.mustReach(t, b, "u0001")

	begin()
	inside := b.as(t, "u0001")
	s.must(t, 75, step("undo_promote"), "has clients")
	inside.Close()
	deliverMany(t, b.lmtp(), 1, "u0001")
	b.mustReach(t, a, "u0001") // so that b's sync log is empty again
	s.finally(t, 1, step("undo_promote"), "has taken changes")
	b.mustBe(t, "master")
	s.must(t, 1, step("undo_demote"), "is a master") // two masters otherwise
	a.mustBe(t, "replica")
	b.die()
	s.must(t, 1, call{step: "promote", from: "a", to: "b", number: s.number, attempt: 1}, "refused") // the undo was asked for
	s.must(t, 0, call{step: "promote", from: "a", to: "b", number: s.number, attempt: 2})
	s.finally(t, 1, call{step: "undo_promote", from: "a", to: "b", number: s.number, attempt: 2}, "has taken changes") // the first promotion's mark counts
	b.die()
	s.boot(t, "b")
	b.mustBe(t, "replica") // the table does not say that it is the active
	s.finally(t, 1, call{step: "undo_promote", from: "a", to: "b", number: s.number, attempt: 2}, "has taken changes")
}

// cyrusHooksOvertaken: what an earlier driver or an earlier switch still asks for
// is refused; and if it is at work still, and hangs, the next one ends it.
func cyrusHooksOvertaken(t *testing.T) {
	s, a, b := newHookedPair(t, "u0001")
	s.number = 7
	s.must(t, 0, call{step: "demote", from: "a", to: "b", number: 7, attempt: 1})
	s.must(t, 0, call{step: "catch_up", from: "a", to: "b", number: 7, attempt: 1})

	// The first driver's promote hangs in the start of b; the driver dies, and the
	// next one turns the switch back.
	slow := filepath.Join(s.dir, "slow")
	writeFile(t, slow, "")
	var orphan, undo atomic.Pointer[hookEnd]
	run := func(c call, end *atomic.Pointer[hookEnd]) {
		e := s.call(t, c)
		end.Store(&e)
	}
	done := make(chan struct{}, 2)
	go func() {
		run(call{step: "promote", from: "a", to: "b", number: 7, attempt: 1}, &orphan)
		done <- struct{}{}
	}()
	within(t, 5*time.Second, "the promotion is at work", func() bool {
		_, err := os.Stat(filepath.Join(s.dir, "state-remote", "b.ticket"))
		return err == nil
	})
	go func() {
		run(call{step: "undo_promote", from: "a", to: "b", number: 7, attempt: 2}, &undo)
		done <- struct{}{}
	}()
	// It gives the orphan a second, and ends it.
	within(t, 20*time.Second, "the orphan has ended", func() bool { return orphan.Load() != nil })
	if end := orphan.Load(); end.code == 0 {
		t.Errorf("the orphan: %v", *end)
	}
	// What else the first driver wants is refused on a too.
	s.must(t, 1, call{step: "promote", from: "a", to: "b", number: 7, attempt: 1}, "refused")
	must(t, os.Remove(slow))
	<-done
	<-done
	undo.Load().must(t, 0, call{step: "undo_promote"}, "ends an earlier call: promote of ma01")
	b.mustBe(t, "replica")
	for _, step := range []string{"prove", "demote", "catch_up", "promote", "undo_promote"} {
		s.must(t, 1, call{step: step, from: "a", to: "b", number: 7, attempt: 1}, "refused", "attempt 2")
	}
	s.must(t, 1, call{step: "promote", from: "a", to: "b", number: 7, attempt: 2}, "refused") // the undo of the same attempt came later
	s.must(t, 1, call{step: "demote", from: "b", to: "a", number: 6, attempt: 9, epoch: 999}, "refused", "switch 7")
	s.must(t, 1, call{step: "demote", from: "a", to: "b", number: 8, attempt: 1, epoch: 50}, "refused", "epoch 107") // another table
	s.must(t, 0, call{step: "undo_demote", from: "a", to: "b", number: 7, attempt: 2})
	a.mustBe(t, "master")
	s.must(t, 1, call{step: "demote", from: "a", to: "b", number: 7, attempt: 2}, "refused", "undo_demote")
	a.mustBe(t, "master")
	s.change(t, "a", "b", nil, nil) // the next switch is not kept out
}

// cyrusHooksForcedCommand: the key of the hooks can do nothing but the hooks.
func cyrusHooksForcedCommand(t *testing.T) {
	s, _, b := newHookedPair(t, "u0001")
	master := b.master(t)
	marker := filepath.Join(s.dir, "marker")
	remote := func(request string) (string, error) {
		return runTool(t, 20*time.Second, strings.NewReader("all\n"), "env", "SSH_ORIGINAL_COMMAND="+request, s.script, "-c",
			filepath.Join(s.dir, "remote.conf"), "--remote")
	}
	const good = "prove b 9 109 1 prove ma01 a"
	for _, request := range []string{
		"", " ", "sh", "demote", "touch " + marker, "$(touch " + marker + ")", "`touch " + marker + "`",
		good + "; touch " + marker, good + "\ntouch " + marker, good + "\n", good + "\x00x", good + " | sh", good + " &", good + " x",
		"prove b 9 109 1 prove ma01 $(touch${IFS}" + marker + ")", "prove b 9 109 1 prove ma01 'a'", "prove b 9 109 1 prove ma01 *",
		"prove b x 109 1 prove ma01 a", "prove b 9 109 -1 prove ma01 a", "prove b 9999999999999999999999 109 1 prove ma01 a",
		"prove b 9 109 1 demote ma01 a", "demote b 9 109 1 prove ma01 a", "run b 9 109 1 run ma01 a", "--at b 9 109 1 prove ma01 a",
		"stop_all b 9 109 1 demote ma01 a", "prove ../b 9 109 1 prove ma01 a", "prove .. 9 109 1 prove ma01 a", "prove -c 9 109 1 prove ma01 a",
		"prove a 9 109 1 prove ma01 b", "prove c 9 109 1 prove ma01 a", "prove b 9 109 1 prove ma01 ä", "prove  b 9 109 1 prove ma01",
	} {
		if strings.Contains(request, "\x00") { // no environment can hold it
			continue
		}
		if out, err := remote(request); err == nil || !strings.Contains(out, "refused") {
			t.Errorf("%q: %v: %s", request, err, out)
		}
	}
	if _, err := os.Stat(marker); err == nil {
		t.Error("something ran a command of the request")
	}
	if out, err := remote(good); err != nil {
		t.Errorf("%q: %v: %s", good, err, out)
	}
	if now := b.master(t); now != master {
		t.Errorf("b was restarted: %d, then %d", master, now)
	}
	b.mustBe(t, "replica")
}

// cyrusHooksStart: an instance that comes up by itself is a master only if the
// table says so, plainly; a dead master that is not the active any more is not.
func cyrusHooksStart(t *testing.T) {
	s, a, b := newHookedPair(t, "u0001")
	again := func(part string) {
		t.Helper()
		a.die()
		s.boot(t, "a")
		a.mustBe(t, part)
	}
	again("master")
	for _, phase := range []string{"hold", "demote", "promote", "abort"} {
		s.tableSays(t, "a", phase)
		again("replica")
	}
	must(t, os.Remove(s.table))
	again("replica")
	for _, says := range []string{`"in_doubt":true`, `"in_doubt":false,"blocked":"this frontend cannot renew its lease"`} {
		writeFile(t, s.table, `[{"role":"ma01","active":"a","phase":"open",`+says+`}]`)
		again("replica")
	}
	s.tableSays(t, "b", "open")
	again("replica")
	// What a hook once said holds for one start, a minute, and this boot.
	ticket := filepath.Join(s.dir, "state-local", "a.ticket")
	boot := strings.TrimSpace(readFile(t, "/proc/sys/kernel/random/boot_id"))
	for _, old := range []string{boot + " 1 master\n", "another 99999999999 master\n", ""} {
		writeFile(t, ticket, old)
		again("replica")
	}
	writeFile(t, ticket, boot+" 99999999999 master\n")
	again("master")
	again("replica")
	b.mustBe(t, "replica")
}

// cyrusHooksDriven: posthouse itself drives them, while clients work. Nobody is
// refused, and what was acknowledged on one side is on the other at once: no
// flush by the test. A member that dies asks the real table when it comes back.
func cyrusHooksDriven(t *testing.T) {
	users := userNames(12)
	s, a, b := newHookedPair(t, users...)
	site := newSite(t, a.backend(), b.backend(), users...)
	var hooks []string
	for _, step := range []string{"demote", "catch_up", "promote", "undo_promote", "undo_demote"} {
		hooks = append(hooks, fmt.Sprintf("%s: [%s, -c, %s, %s]", step, s.script, s.config, step))
	}
	site.hooks = ", hooks: {" + strings.Join(hooks, ", ") + "}"
	p := startFrontend(t, site)
	path := filepath.Join(s.dir, "local.conf")
	writeFile(t, path, readFile(t, path)+fmt.Sprintf("ask=%s roles -o json -c %s\n", builtPosthouse(t, true), p.conf))

	var crowd crowd
	crowd.start(p, users)
	t.Cleanup(crowd.stop)
	crowd.everybodyLogsIn(t, time.Now().Add(-time.Minute))
	crowd.everybodyWorks(t)

	down := filepath.Join(s.dir, "down") // b's host is away: turned back at once, a was not stopped
	writeFile(t, down, "")
	master := a.master(t)
	result := p.switchTo(t, "b")
	mustFail(t, result, "b is not ready")
	p.mustBeOn(t, "a")
	if now := a.master(t); now != master {
		t.Errorf("a was restarted: %d, then %d", master, now)
	}
	t.Logf("turned back: %v", result.took.Round(time.Millisecond))
	must(t, os.Remove(down))
	b.die() // demote brings it up again
	crowd.everybodyLogsIn(t, time.Now().Add(-result.took))

	for _, to := range []string{"b", "a", "b"} {
		result := p.switchTo(t, to)
		mustOpen(t, result)
		t.Logf("to %s: %v", to, result.took.Round(time.Millisecond))
		crowd.everybodyLogsIn(t, time.Now())
	}
	crowd.stop()
	for _, complaint := range crowd.complaints {
		t.Error(complaint)
	}
	b.mustBe(t, "master")
	for _, user := range users {
		has, err := b.as(t, user).subjects("INBOX")
		must(t, err)
		for _, subject := range crowd.acked[user] {
			if !slices.Contains(has, subject) {
				t.Errorf("%s: acknowledged, but not on b: %s", user, subject)
			}
		}
	}
	t.Logf("%d messages acknowledged", crowd.messages())

	a.die()
	s.boot(t, "a")
	a.mustBe(t, "replica")
	mustOpen(t, p.switchTo(t, "a"))
	a.die()
	s.boot(t, "a")
	a.mustBe(t, "master")
}
