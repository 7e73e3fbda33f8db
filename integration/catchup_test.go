package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/backendpool/catchup"
)

// checked is a member as catchup gets it.
func checked(name string, s backend, style backendpool.Style) *backendpool.Backend {
	b := &backendpool.Backend{
		Name:      name,
		Addresses: map[string]string{"imap": s.host + ":143", "sieve": s.host + ":4190"},
		TLS:       backendpool.TLSStartTLS,
		TLSConfig: lab.ca.client(s.cert),
		Style:     style,
		User:      "proxy",
	}
	b.SetPassword(password)
	return b
}

// comparison is a pair of members and what compares them.
type comparison struct {
	a, b     *backendpool.Backend
	comparer *catchup.Comparer
}

func newComparison(a, b backend, style backendpool.Style) *comparison {
	c := &comparison{a: checked("a", a, style), b: checked("b", b, style)}
	pool := backendpool.New([]*backendpool.Backend{c.a, c.b}, backendpool.Limits{ConnectTimeout: 5 * time.Second, Logins: 8, KeepAlive: time.Minute})
	c.comparer = catchup.New(pool, catchup.Options{Parallel: 4, Timeout: 20 * time.Second})
	return c
}

func (c *comparison) compare(t testing.TB, users ...string) *catchup.Report {
	t.Helper()
	began := time.Now()
	report, err := c.comparer.Compare(context.Background(), c.a, c.b, users)
	must(t, err)
	t.Logf("%d users in %v: %d equal, %d differences, refused %v", len(users), time.Since(began), report.Equal, report.Count, report.Refused)
	return report
}

// mustDiffer asserts that exactly one difference is found, and where.
func (c *comparison) mustDiffer(t testing.TB, user, mailbox, what, from, to string) {
	t.Helper()
	report := c.compare(t, user)
	if report.Count != 1 || report.Equal != 0 || len(report.Unequal) != 1 {
		t.Fatalf("want one difference of %s: %+v", what, report)
	}
	d := report.Differences[0]
	if d.User != user || d.Mailbox != mailbox || d.What != what || !strings.Contains(d.From, from) || !strings.Contains(d.To, to) {
		t.Errorf("want %s, mailbox %q, %s: %q and %q: %v", user, mailbox, what, from, to, d)
	}
	t.Log(d)
}

// ok runs IMAP commands that must succeed.
func (w *wire) ok(t testing.TB, commands ...string) {
	t.Helper()
	for _, command := range commands {
		_, _, err := w.imap(5*time.Second, "%s", command)
		must(t, err)
	}
}

// manage runs ManageSieve commands at a server that takes passwords in the open.
func manage(t testing.TB, host, user string, commands ...string) {
	t.Helper()
	w, err := dialWire(host+":4190", nil)
	must(t, err)
	defer w.Close()
	_, _, err = w.until(5*time.Second, "OK")
	must(t, err)
	for _, command := range append([]string{fmt.Sprintf(`AUTHENTICATE "PLAIN" "%s"`, plain("", user, password))}, commands...) {
		must(t, w.say("%s", command))
		_, last, err := w.until(5*time.Second, "OK", "NO", "BYE")
		must(t, err)
		if !strings.HasPrefix(last, "OK") {
			t.Fatalf("%s: %s", command, last)
		}
	}
}

func putScript(name, content string) string {
	return fmt.Sprintf("PUTSCRIPT %q {%d+}\r\n%s", name, len(content), content)
}

// furnish gives a user something of everything.
func furnish(t testing.TB, w *wire, host, user string) {
	t.Helper()
	w.ok(t, "CREATE Drafts", "CREATE &ZeVnLIqe-", "CREATE empty", "SUBSCRIBE INBOX", "SUBSCRIBE Drafts")
	for i := range 3 {
		must(t, w.append(5*time.Second, "INBOX", fmt.Sprint("message ", i)))
	}
	must(t, w.append(5*time.Second, "&ZeVnLIqe-", "below"))
	w.ok(t, "SELECT INBOX", `STORE 2 +FLAGS (\Seen $Forwarded)`, `STORE 3 +FLAGS (\Deleted)`, "EXPUNGE", "UNSELECT")
	manage(t, host, user, putScript("winter", "keep;\r\n"), putScript("summer time", "discard;\r\n"), `SETACTIVE "winter"`, "LOGOUT")
}

// TestCatchUpCyrus: what replication has brought over is equal; each kind of
// change that it has not brought over is found, and nothing else.
func TestCatchUpCyrus(t *testing.T) {
	t.Parallel()
	users := userNames(12)
	pair := newCyrusPair(t, users[:11]...)
	for _, user := range users[:11] {
		furnish(t, pair.a.as(t, user), pair.a.host, user)
		pair.a.admin(t).ok(t, fmt.Sprintf("SETQUOTA user/%s (STORAGE 100000)", user))
	}
	pair.a.stopSync(t)
	pair.a.flush(t)
	c := newComparison(pair.a.backend(), pair.b.backend(), backendpool.StyleAuthzid)
	// u0012 has a password and no mailbox, on either.
	if report := c.compare(t, users...); report.Err() != nil || report.Equal != len(users) {
		t.Fatalf("flushed, yet not equal: %+v", report)
	}

	as := func(i int) *wire { return pair.a.as(t, users[i]) }
	must(t, as(0).append(5*time.Second, "INBOX", "new"))
	c.mustDiffer(t, users[0], "INBOX", "status", "3 messages", "2 messages")
	as(1).ok(t, "SELECT INBOX", `STORE 1 +FLAGS (\Flagged)`)
	c.mustDiffer(t, users[1], "INBOX", "status", "HIGHESTMODSEQ", "HIGHESTMODSEQ")
	as(2).ok(t, "SUBSCRIBE empty")
	c.mustDiffer(t, users[2], "empty", "subscription", "subscribed", "")
	as(3).ok(t, "SETACL Drafts u0001 lr")
	report := c.compare(t, users[3]) // it has its place in HIGHESTMODSEQ, too
	if report.Count != 2 || report.Differences[0].What != "ACL" || !strings.Contains(report.Differences[0].From, `"u0001" lr`) {
		t.Errorf("ACL: %v", report.Err())
	}
	pair.a.admin(t).ok(t, "SETQUOTA user/"+users[4]+" (STORAGE 200000)")
	c.mustDiffer(t, users[4], "", `limits of quota root "INBOX"`, "STORAGE 200000", "STORAGE 100000")
	as(5).ok(t, "CREATE more")
	c.mustDiffer(t, users[5], "more", "mailbox", "exists", "")
	manage(t, pair.a.host, users[6], putScript("winter", "stop;\r\n"), "LOGOUT")
	c.mustDiffer(t, users[6], "", `script "winter"`, "SHA-256", "SHA-256")
	manage(t, pair.a.host, users[7], `SETACTIVE "summer time"`, "LOGOUT")
	c.mustDiffer(t, users[7], "", "active script", "mm", "winter")
	manage(t, pair.a.host, users[8], putScript("third", "keep;\r\n"), "LOGOUT")
	c.mustDiffer(t, users[8], "", `script "third"`, "SHA-256", "")
	pair.a.createUsers(t, users[11])
	report = c.compare(t, users[11])
	if report.Count == 0 || report.Differences[0].Mailbox != "INBOX" || report.Differences[0].To != "" {
		t.Errorf("a user whom only a has: %v", report.Err())
	}
	if report := c.compare(t, users[9:11]...); report.Err() != nil || report.Equal != 2 {
		t.Errorf("who has not changed: %+v", report)
	}
	c.mustNotTrustRefusals(t, users[9])
}

// mustNotTrustRefusals: with a wrong password on both, nobody is equal.
func (c *comparison) mustNotTrustRefusals(t testing.TB, user string) {
	t.Helper()
	c.a.SetPassword("wrong")
	c.b.SetPassword("wrong")
	report, err := c.comparer.Compare(context.Background(), c.a, c.b, []string{user})
	if err == nil || report.Equal != 0 {
		t.Errorf("wrong credentials: %+v, %v", report, err)
	}
	t.Log(err)
}

// TestCatchUpDovecot: the same after dsync.
func TestCatchUpDovecot(t *testing.T) {
	t.Parallel()
	users := userNames(9)
	a, b := newDovecot(t), newDovecot(t)
	sync := func(user string) {
		t.Helper()
		doveadm := filepath.Join(filepath.Dir(dovecotProgram(t)), "..", "bin", "doveadm")
		mail := filepath.Join(b.mailDir(), user, "Maildir")
		must(t, exec.Command("install", "-d", "-o", "nobody", "-g", "nogroup", filepath.Dir(mail)).Run())
		if out, err := exec.Command(doveadm, "-c", filepath.Join(a.dir, "dovecot.conf"), "backup", "-u", user, "maildir:"+mail).CombinedOutput(); err != nil {
			t.Fatalf("doveadm backup: %v: %s", err, out)
		}
	}
	for _, user := range users[:8] {
		furnish(t, a.as(t, user), a.host, user)
		sync(user)
		manage(t, b.host, user, putScript("winter", "keep;\r\n"), putScript("summer time", "discard;\r\n"), `SETACTIVE "winter"`, "LOGOUT")
	}
	c := newComparison(a.backend(), b.backend(), backendpool.StyleMasterUser)
	if report := c.compare(t, users[:8]...); report.Err() != nil || report.Equal != 8 {
		t.Fatalf("synced, yet not equal: %v", report.Err())
	}
	for _, d := range []*dovecot{a, b} {
		w := d.as(t, users[0])
		for _, mailbox := range []string{"INBOX", "empty", "Drafts"} {
			answer, _, err := w.imap(5*time.Second, "STATUS %s (HIGHESTMODSEQ)", mailbox)
			must(t, err)
			t.Log(d.name, answer)
		}
	}

	as := func(i int) *wire { return a.as(t, users[i]) }
	must(t, as(0).append(5*time.Second, "INBOX", "new"))
	c.mustDiffer(t, users[0], "INBOX", "status", "3 messages", "2 messages")
	as(1).ok(t, "SELECT INBOX", `STORE 2 +FLAGS (\Flagged)`)
	c.mustDiffer(t, users[1], "INBOX", "flags", `UID 2 ($forwarded \flagged \seen)`, `UID 2 ($forwarded \seen)`)
	as(2).ok(t, "SUBSCRIBE empty")
	c.mustDiffer(t, users[2], "empty", "subscription", "subscribed", "")
	as(3).ok(t, "CREATE more")
	c.mustDiffer(t, users[3], "more", "mailbox", "exists", "")
	manage(t, a.host, users[4], putScript("winter", "stop;\r\n"), "LOGOUT")
	c.mustDiffer(t, users[4], "", `script "winter"`, "SHA-256", "SHA-256")
	manage(t, a.host, users[5], `SETACTIVE "summer time"`, "LOGOUT")
	c.mustDiffer(t, users[5], "", "active script", "mm", "winter")
	for _, i := range []int{0, 1, 2, 3} {
		sync(users[i])
	}
	if report := c.compare(t, users[:4]...); report.Err() != nil || report.Equal != 4 {
		t.Errorf("synced again, yet not equal: %v", report.Err())
	}
	c.mustNotTrustRefusals(t, users[7])
}

// TestCatchUpSwitch: a switch waits for what replication has not brought over,
// and opens as soon as it has; if it never does, it names whose mail is missing.
func TestCatchUpSwitch(t *testing.T) {
	t.Parallel()
	users := userNames(6)
	pair := newCyrusPair(t, users...)
	site := newSite(t, pair.a.backend(), pair.b.backend(), users...)
	site.hooks = ", catch_up: {type: imap}"
	site.limits = "hold_window: 25s, switch_budget: 20s"
	p := startFrontend(t, site)
	for _, user := range users {
		must(t, p.as(t, user).append(10*time.Second, "INBOX", "through posthouse"))
	}
	pair.a.stopSync(t)
	pair.a.flush(t)
	pair.a.deliver(t, users[1], "behind posthouse's back") // the table is new: anybody's mail may have changed
	result := p.switchTo(t, "b")
	mustFail(t, result, "catch_up", users[1], `mailbox \"INBOX\"`, "2 messages", "1 messages", "5 equal, 1 not; those are compared again in HOLD", "5 equal, 1 not\"")
	if strings.Contains(result.said, users[2]) {
		t.Errorf("%s is named, whose mail is on both: %v", users[2], result)
	}
	p.mustBeOn(t, "a")
	must(t, p.as(t, users[1]).append(10*time.Second, "INBOX", "after the abort"))

	ended := p.startSwitch(t, "b")
	within(t, 15*time.Second, "the members are compared", func() bool { return p.role(t).Phase == "catch-up" })
	remains(t, time.Second, "the switch waits", func() bool { return len(ended) == 0 })
	pair.a.flush(t)
	mustOpen(t, <-ended)
	p.mustBeOn(t, "b")
	has, err := pair.b.as(t, users[1]).subjects("INBOX")
	must(t, err)
	for _, subject := range []string{"through posthouse", "behind posthouse's back", "after the abort"} {
		if !slices.Contains(has, subject) {
			t.Errorf("b opened without %q: %q", subject, has)
		}
	}
	stdout, _, _ := p.cli(t, "switches")
	if !strings.Contains(stdout, "users compared: 1 equal, 0 not") {
		t.Errorf("the history does not say what was compared: %s", tail(stdout, 40))
	}

	// On the way back only who was seen since counts: nobody but u0001.
	pair.b.startSync(t)
	pair.b.deliver(t, users[2], "for a")
	must(t, p.as(t, users[0]).append(10*time.Second, "INBOX", "seen"))
	mustOpen(t, p.switchTo(t, "a"))
	if stdout, _, _ = p.cli(t, "switches"); !strings.Contains(stdout, "users compared: 1 equal, 0 not") {
		t.Errorf("on the way back: %s", tail(stdout, 40))
	}
	p.mustBeOn(t, "a")

	// Safety 23: whom a frontend has seen that was killed, nobody knows.
	p.kill()
	p.start(t)
	p.ready(t)
	mustOpen(t, p.switchTo(t, "b", "--confirmed-clean"))
	if stdout, _, _ = p.cli(t, "switches"); !strings.Contains(stdout, `"compared": "users compared: 6 equal, 0 not`) {
		t.Errorf("after a frontend was killed: %s", tail(stdout, 40))
	}
}

// TestCatchUpOfAMirroredPair: with the hooks that we ship both members are
// replicas while they are compared, and have an address for that. What was in no
// sync log is found before HOLD, and the hook told of it.
func TestCatchUpOfAMirroredPair(t *testing.T) {
	t.Parallel()
	users := userNames(4)
	s, a, b := newHookedPair(t, users...)
	members := [2]backend{a.backend(), b.backend()}
	for i, look := range []string{a.look(), b.look()} {
		members[i].done += fmt.Sprintf(", replica: {imap: %q}", look) // done is the last key of a backend
	}
	site := newSite(t, members[0], members[1], users...)
	var hooks []string
	for _, step := range []string{"demote", "catch_up", "promote", "undo_promote", "undo_demote"} {
		hooks = append(hooks, fmt.Sprintf("%s: [%s, -c, %s, %s]", step, s.script, s.config, step))
	}
	site.hooks = ", hooks: {" + strings.Join(hooks, ", ") + "}, catch_up: {type: imap, parallel: 2, rate: 0}"
	p := startFrontend(t, site)

	must(t, syscall.Kill(a.only(t, "sync_client "), syscall.SIGSTOP))
	deliverMany(t, a.lmtp(), 3, users[3])
	logs, err := filepath.Glob(filepath.Join(a.dir, "conf/sync/log*"))
	must(t, err)
	for _, log := range logs {
		must(t, os.Remove(log))
	}
	result := p.switchTo(t, "b")
	mustOpen(t, result)
	t.Logf("to b: %v", result.took.Round(time.Millisecond))
	if has, err := p.as(t, users[3]).subjects("INBOX"); err != nil || len(has) != 3 {
		t.Errorf("%s has %q on b, %v", users[3], has, err)
	}
	must(t, p.as(t, users[0]).append(10*time.Second, "INBOX", "on b"))
	result = p.switchTo(t, "a")
	mustOpen(t, result)
	t.Logf("to a: %v", result.took.Round(time.Millisecond))
	p.mustBeOn(t, "a")
	stdout, _, _ := p.cli(t, "switches")
	for _, want := range []string{
		`"compared": "users compared: 3 equal, 1 not; not compared: sieve scripts; those are compared again in HOLD"`,
		"users compared: 1 equal, 0 not; not compared: sieve scripts", // which the hook has brought over
		`"compared": "users compared: 2 equal, 0 not`,
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("the history does not say %q: %s", want, tail(stdout, 60))
		}
	}
}
