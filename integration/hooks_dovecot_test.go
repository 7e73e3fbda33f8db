package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hookedDovecot is a Dovecot instance laid out with the shipped templates.
type hookedDovecot struct {
	*dovecot
	name string // of the backend
}

// newHookedDovecots lays a pair out and starts both as their hosts do at boot.
func newHookedDovecots(t testing.TB) (s *hookSite, a, b hookedDovecot) {
	t.Helper()
	a, b = newHookedDovecot(t, "a"), newHookedDovecot(t, "b")
	s = newHookSite(t, "dovecot/posthouse-dovecot", a.etc(), b.etc(), fmt.Sprintf(
		"program=%s\ndoveadm=%s\na.sync=tcp:%s:4949\na.mail=%s\nb.sync=tcp:%s:4949\nb.mail=%s\n",
		dovecotProgram(t), doveadmProgram(t), a.host, a.mailDir(), b.host, b.mailDir()))
	s.boot(t, "a")
	s.boot(t, "b")
	a.mustBe(t, s, "master")
	b.mustBe(t, s, "replica")
	return s, a, b
}

// usersConf is the laboratory's part of the configuration: who there is.
const usersConf = `
log_timestamp = "%Y-%m-%d %H:%M:%S.%{usecs} "
mail_plugins = notify mail_log
disable_plaintext_auth = no
default_login_user = nobody
default_internal_user = daemon
default_internal_group = daemon
first_valid_uid = 1
auth_failure_delay = 0
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=nobody gid=nogroup home=$MAIL/%u allow_all_users=yes
}
`

func newHookedDovecot(t testing.TB, name string) hookedDovecot {
	t.Helper()
	prefix := fmt.Sprintf("dc%d", dovecotSerial.Add(1))
	dir := newDir(t, prefix+"-")
	d := hookedDovecot{&dovecot{daemon: &daemon{name: prefix, dir: dir}, host: nextHost(), cert: prefix + ".test"}, name}
	must(t, os.Mkdir(d.etc(), 0o755))
	must(t, os.Mkdir(d.mailDir(), 0o755))
	must(t, exec.Command("chown", "nobody:nogroup", d.mailDir()).Run())
	lab.ca.issue(t, dir, d.cert, d.host)
	writeFile(t, filepath.Join(dir, "master-users"), "proxy:{PLAIN}"+password+"\n")
	writeFile(t, filepath.Join(d.etc(), "users.conf"), strings.ReplaceAll(usersConf, "$MAIL", d.mailDir()))
	expand := strings.NewReplacer("@RUN@", filepath.Join(dir, "run"), "@DATA@", dir, "@DIR@", d.etc(), "@NAME@", prefix,
		"@ADDRESS@", d.host, "@PASSWORD@", password, "@FRONTENDS@", "127.0.0.0/8")
	for _, file := range []string{"common.conf", "dovecot.conf", "dovecot-replica.conf"} {
		writeFile(t, filepath.Join(d.etc(), file), expand.Replace(readFile(t, filepath.Join(lab.repo, "deploy/dovecot/instance", file))))
	}
	t.Cleanup(func() { d.die() })
	return d
}

func (d hookedDovecot) etc() string { return filepath.Join(d.dir, "etc") }

// processes are the master and its children: the children do not say whose they are.
func (d hookedDovecot) processes() []process {
	masters := map[int]bool{}
	all := processes()
	for _, p := range all {
		if strings.Contains(p.command, d.dir+"/") && p.pid == p.session {
			masters[p.pid] = true
		}
	}
	return slices.DeleteFunc(all, func(p process) bool { return !masters[p.session] })
}

// leader is the id of the master. While that becomes another program it has no
// arguments to know it by.
func (d hookedDovecot) leader(t testing.TB) int {
	t.Helper()
	var all []process
	within(t, 10*time.Second, d.name+" runs", func() bool { all = d.processes(); return len(all) > 0 })
	return all[0].session
}

func (d hookedDovecot) die() {
	for _, p := range d.processes() {
		syscall.Kill(p.pid, syscall.SIGKILL)
	}
	becomes(5*time.Second, func() bool { return len(d.processes()) == 0 })
}

func (d hookedDovecot) mustBe(t testing.TB, s *hookSite, part string) {
	t.Helper()
	wants := map[string]bool{":143": part == "master", ":110": part == "master", ":4190": part == "master", ":24": part == "master",
		":4949": part == "replica"}
	var wrong []string
	if !becomes(10*time.Second, func() bool {
		wrong = nil
		for port, want := range wants {
			if accepts(d.host+port) != want {
				wrong = append(wrong, port)
			}
		}
		return len(wrong) == 0
	}) {
		starts, _ := os.ReadFile(filepath.Join(s.dir, "starts"))
		t.Fatalf("%s is no %s: ports %v; processes %v\n%s\n%s", d.name, part, wrong, d.processes(), starts, tail(d.logText(), 10))
	}
}

// contents is what user's INBOX holds: UIDVALIDITY, UIDNEXT and each message's
// UID and subject.
func (d hookedDovecot) contents(t testing.TB, user string) []string {
	t.Helper()
	w := d.as(t, user)
	defer w.Close()
	all, _, err := w.imap(5*time.Second, "STATUS INBOX (UIDVALIDITY UIDNEXT)")
	must(t, err)
	_, _, err = w.imap(5*time.Second, "EXAMINE INBOX")
	must(t, err)
	untagged, _, err := w.imap(10*time.Second, "UID FETCH 1:* (UID FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
	must(t, err)
	for _, line := range untagged {
		if uidItem.MatchString(line) || strings.HasPrefix(line, "Subject: ") {
			all = append(all, strings.ReplaceAll(line, `\Recent`, "")) // whoever looks first
		}
	}
	return all
}

// TestDovecotHooks runs the hooks that we ship for Dovecot, with the templates
// that we ship, by hand against a real pair.
func TestDovecotHooks(t *testing.T) {
	t.Parallel()
	t.Run("cycle", dovecotHooksCycle)
	t.Run("undo", dovecotHooksUndo)
	t.Run("flags", dovecotHooksFlags)
}

func dovecotHooksCycle(t *testing.T) {
	users := userNames(5)
	s, a, b := newHookedDovecots(t)
	took := map[string][]time.Duration{}
	from, to, old, next := "a", "b", a, b
	for range 6 {
		deliverMany(t, old.lmtp(), 3, users...)
		old.deliver(t, users[0], "appended just now")
		var want [][]string
		for _, user := range users {
			want = append(want, old.contents(t, user))
		}
		wrong := func() []string { return nil }
		for step, d := range s.change(t, from, to, users, func() { wrong = watchClosed(old.host) }) {
			took[step] = append(took[step], d)
		}
		next.mustBe(t, s, "master")
		old.mustBe(t, s, "replica")
		for i, user := range users {
			if all := next.contents(t, user); !slices.Equal(all, want[i]) {
				t.Fatalf("%s on %s:\n%q\nwant\n%q", user, to, all, want[i])
			}
		}
		if open := wrong(); len(open) > 0 {
			t.Errorf("%s took connections after demote: %v", from, open)
		}
		from, to, old, next = to, from, next, old
	}
	logTook(t, took)

	s.number++
	step := func(name string) call {
		return call{step: name, from: "a", to: "b", number: s.number, attempt: 1, users: users}
	}
	for _, at := range []string{a.imap(), a.lmtp()} {
		w, err := dialWire(at, nil)
		must(t, err)
		_, err = w.line(5 * time.Second)
		must(t, err)
		s.must(t, 75, step("prove"), "still at work")
		w.Close()
		within(t, 5*time.Second, "nobody is at work", func() bool { return s.call(t, step("prove")).code == 0 })
	}
	inside := a.as(t, users[0])
	s.must(t, 75, step("prove"), "imap[")
	s.must(t, 0, step("demote"))
	if err := inside.farewell(5 * time.Second); err != nil {
		t.Logf("the session that was inside: %v", err)
	}
	replica := a.leader(t)
	s.must(t, 0, step("demote"), "already")
	s.must(t, 75, call{step: "catch_up", from: "a", to: "b", number: s.number, attempt: 1}) // our user database cannot list its users
	s.must(t, 0, step("catch_up"), "5 users")
	s.must(t, 0, call{step: "catch_up", from: "a", to: "b", number: s.number, attempt: 1, users: []string{}}, "0 users")
	s.must(t, 0, step("promote"))
	master := b.leader(t)
	s.must(t, 0, step("promote"), "already")
	if now := a.leader(t); now != replica {
		t.Errorf("demote restarted the replica: %d, then %d", replica, now)
	}
	if now := b.leader(t); now != master {
		t.Errorf("promote restarted the master: %d, then %d", master, now)
	}
}

func dovecotHooksUndo(t *testing.T) {
	s, a, b := newHookedDovecots(t)
	a.deliver(t, "u0001", "first")
	step := func(name string) call {
		return call{step: name, from: "a", to: "b", number: s.number, attempt: 1, users: []string{"u0001"}}
	}
	begin := func() {
		s.number++
		for _, name := range []string{"demote", "catch_up", "promote"} {
			s.must(t, 0, step(name))
		}
	}
	begin()
	s.finally(t, 0, step("undo_promote"))
	s.must(t, 0, step("undo_promote"), "already")
	s.must(t, 0, step("undo_demote"))
	s.must(t, 0, step("undo_demote"), "already")
	a.mustBe(t, s, "master")
	b.mustBe(t, s, "replica")
	s.must(t, 1, step("demote"), "refused")
	a.deliver(t, "u0001", "second")

	begin()
	b.deliver(t, "u0001", "third")
	s.finally(t, 1, step("undo_promote"), "has taken changes")
	s.must(t, 1, step("undo_demote"), "is a master")
	if has := subjectsOf(t, b, "u0001"); !slices.Equal(has, []string{"first", "second", "third"}) {
		t.Errorf("b has %q", has)
	}

	// A master that dies leaves sessions behind; demote finds and ends them.
	inside := b.as(t, "u0001")
	leader := b.processes()[0].session
	must(t, syscall.Kill(leader, syscall.SIGKILL))
	s.number++
	s.must(t, 0, call{step: "demote", from: "b", to: "a", number: s.number, attempt: 1})
	for _, p := range processes() {
		if p.session == leader {
			t.Errorf("%v has survived", p)
		}
	}
	if _, _, err := inside.imap(5*time.Second, "NOOP"); err == nil {
		t.Error("the session goes on")
	}
	b.mustBe(t, s, "replica")
}

// dovecotHooksFlags: what dsync by itself would leave on the replica as it was.
func dovecotHooksFlags(t *testing.T) {
	s, a, b := newHookedDovecots(t)
	// move switches, and returns what catch_up said.
	move := func(from, to hookedDovecot) (said string) {
		t.Helper()
		want := from.contents(t, "u0001")
		s.number++
		for _, step := range []string{"demote", "catch_up", "promote"} {
			end := s.must(t, 0, call{step: step, from: from.name, to: to.name, number: s.number, attempt: 1, users: []string{"u0001", "u0002"}})
			if step == "catch_up" {
				said = end.said
			}
		}
		s.tableSays(t, to.name, "open")
		if has := to.contents(t, "u0001"); !slices.Equal(has, want) {
			t.Errorf("%s has\n%q\nwant\n%q", to.name, has, want)
		}
		return said
	}
	does := func(d hookedDovecot, commands ...string) {
		w := d.as(t, "u0001")
		defer w.Close()
		w.ok(t, append([]string{"SELECT INBOX"}, commands...)...)
	}
	// An expunge counts once more on the replica; a change on the master makes the
	// counters equal, by which dsync takes the mailbox for unchanged (without -f).
	deliverMany(t, a.lmtp(), 3, "u0001")
	does(a, `STORE 1 +FLAGS (\Deleted)`, "EXPUNGE")
	a.sync(t, b, "u0001")
	does(a, `STORE 1 +FLAGS (\Answered)`)
	if has, want := b.counters(t, "u0001"), a.counters(t, "u0001"); has != want {
		t.Fatalf("the counters are not equal: this run proves nothing: %s, %s", has, want)
	}
	if said := move(a, b); strings.Contains(said, "flags") {
		t.Errorf("dsync has not compared: %s", said)
	}

	// b's log says that b has set the flags; a's removal of them has a lower number
	// than the message has on b, where a copy of many messages has counted many times.
	does(b, `STORE 1 +FLAGS (\Seen Kept $Junk)`)
	move(b, a)
	deliverMany(t, a.lmtp(), 10, "u0001")
	a.sync(t, b, "u0001")
	does(a, "COPY 1:* INBOX")
	a.sync(t, b, "u0001")
	for _, sign := range []string{"-", "+"} {
		does(a, "STORE 1 "+sign+`FLAGS (\Seen $Junk)`)
		a.sync(t, b, "u0001")
	}
	does(a, `STORE 1 -FLAGS (\Seen $Junk)`)
	if said := move(a, b); !strings.Contains(said, "flags that dsync had not brought: 1") {
		t.Errorf("dsync has brought all: this run proves nothing: %s", said)
	}

	// What dsync leaves out keeps the new one from being opened.
	deliverMany(t, b.lmtp(), 1, "u0002")
	s.must(t, 0, call{step: "demote", from: "b", to: "a", number: s.number + 1, attempt: 1})
	catchUp := call{step: "catch_up", from: "b", to: "a", number: s.number + 1, attempt: 1, users: []string{"u0001", "u0002"}}
	forgetful := filepath.Join(s.dir, "doveadm")
	must(t, os.WriteFile(forgetful, []byte("#!/bin/sh\ncase \"$*\" in *sync*) ;; *) exec "+doveadmProgram(t)+" \"$@\" ;; esac\n"), 0o755))
	s.configure(t, "remote.conf", "doveadm="+forgetful+"\n")
	s.must(t, 75, catchUp, "differs from b: 1 differences: lacks u0002")
}

// sync is what README.md recommends between switches.
func (d hookedDovecot) sync(t testing.TB, to hookedDovecot, user string) {
	t.Helper()
	d.doveadm(t, "sync", "-1", "-f", "-u", user, "tcp:"+to.host+":4949")
}

// counters are those by which dsync tells whether a mailbox has changed.
func (d hookedDovecot) counters(t testing.TB, user string) string {
	t.Helper()
	return d.doveadm(t, "mailbox", "status", "-u", user, "messages uidnext uidvalidity highestmodseq", "INBOX")
}

func (d hookedDovecot) doveadm(t testing.TB, args ...string) string {
	t.Helper()
	out, err := runTool(t, 20*time.Second, nil, append([]string{doveadmProgram(t), "-c", filepath.Join(d.etc(), "dovecot.conf")}, args...)...)
	if err != nil {
		t.Fatalf("doveadm %s: %v: %s", args, err, out)
	}
	return out
}

func doveadmProgram(t testing.TB) string {
	t.Helper()
	return filepath.Join(filepath.Dir(dovecotProgram(t)), "..", "bin", "doveadm")
}
