package integration

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestFailoverDovecot: b dies with mail that nobody has sent to a. a serves and
// takes more; rejoin keeps what b had, and makes it a copy of a.
func TestFailoverDovecot(t *testing.T) {
	t.Parallel()
	users := []string{"u0001", "u0002"}
	s, a, b := newHookedDovecots(t)
	for _, d := range []hookedDovecot{a, b} { // from its next start on, which the switch brings
		d.listUsers(t, users)
	}
	a.deliver(t, "u0001", "on both")
	a.fill(t, "u0002", "Deleted", "on both, in Deleted")
	s.change(t, "a", "b", users, nil)
	b.deliver(t, "u0001", "only on b")
	b.fill(t, "u0002", "New", "only on b, in New")
	b.fill(t, "u0002", "Both", "only on b, in Both")
	b.as(t, "u0002").ok(t, "DELETE Deleted")
	b.die()

	s.number++
	s.must(t, 0, call{step: "fence", from: "b", to: "a", number: s.number, attempt: 1}, "no process of it is left")
	s.must(t, 0, call{step: "promote", to: "a", number: s.number, attempt: 1}, "runs as master")
	s.tableSays(t, "a", "open")
	if has := subjectsOf(t, a, "u0001"); !slices.Equal(has, []string{"on both"}) {
		t.Errorf("u0001 finds %q on a", has)
	}
	a.deliver(t, "u0001", "in between")               // its UID is that of the message which is on b only
	a.fill(t, "u0002", "Both", "in between, in Both") // made on both: two mailboxes of one name
	w := a.as(t, "u0002")
	must(t, w.append(5*time.Second, "Deleted", "in between, in Deleted"))
	w.Close()

	rejoin := call{step: "rejoin", from: "a", to: "b", number: s.number, attempt: 1}
	said := s.must(t, 0, rejoin, "runs as replica", "all users sent", "what it had not sent is only there").said
	b.mustBe(t, s, "replica")
	a.mustBe(t, s, "master")
	var want [2][]string
	for i, user := range users {
		want[i] = a.everything(t, user)
	}
	if all := []string{"Both: in between, in Both", "Deleted: in between, in Deleted", "Deleted: on both, in Deleted"}; !slices.Equal(want[1], all) {
		t.Errorf("rejoin has changed the active: %q", want[1])
	}
	inbox := a.contents(t, "u0001")
	s.change(t, "a", "b", []string{}, nil) // no catch-up: rejoin has to have sent all
	for i, user := range users {
		if has := b.everything(t, user); !slices.Equal(has, want[i]) {
			t.Errorf("%s has on b\n%q\nwant\n%q", user, has, want[i])
		}
	}
	if has := b.contents(t, "u0001"); !slices.Equal(has, inbox) {
		t.Errorf("on b:\n%q\nwant\n%q", has, inbox)
	}

	// What README.md says brings over what b had not sent.
	aside := leftOver.FindString(said)
	out, err := runTool(t, 10*time.Second, nil, doveadmProgram(t), "-c", filepath.Join(b.etc(), "dovecot.conf"), "import", "-u", "u0002",
		"maildir:"+filepath.Join(aside, "u0002/Maildir"), "left-over", "all")
	if err != nil {
		t.Fatalf("import: %v: %s", err, out)
	}
	found := b.everything(t, "u0002")
	for _, message := range []string{"left-over.Both: only on b, in Both", "left-over.New: only on b, in New"} {
		if !slices.Contains(found, message) {
			t.Errorf("not imported: %s: %q", message, found)
		}
	}
}

var leftOver = regexp.MustCompile(`\S*/\.left-over\.[0-9T.]*[0-9]`)

// fill makes a folder with a message.
func (d hookedDovecot) fill(t testing.TB, user, folder, subject string) {
	t.Helper()
	w := d.as(t, user)
	defer w.Close()
	w.ok(t, "CREATE "+folder)
	must(t, w.append(5*time.Second, folder, subject))
}

// everything is each message that a user has, as "folder: subject".
func (d hookedDovecot) everything(t testing.TB, user string) (all []string) {
	t.Helper()
	w := d.as(t, user)
	defer w.Close()
	list, _, err := w.imap(5*time.Second, `LIST "" *`)
	must(t, err)
	for _, line := range list {
		folder := line[strings.LastIndex(line, " ")+1:]
		if strings.Contains(line, `\Noselect`) {
			continue
		}
		subjects, err := w.subjects(folder)
		must(t, err)
		for _, subject := range subjects {
			all = append(all, folder+": "+subject)
		}
	}
	slices.Sort(all)
	return all
}

// listUsers gives the instance a user database that can list its users: without
// one there is no `-A`.
func (d hookedDovecot) listUsers(t testing.TB, users []string) {
	t.Helper()
	list, conf := filepath.Join(d.etc(), "users"), filepath.Join(d.etc(), "users.conf")
	var lines strings.Builder
	for _, user := range users {
		fmt.Fprintf(&lines, "%s::nobody:nogroup::%s/%s::\n", user, d.mailDir(), user)
	}
	writeFile(t, list, lines.String())
	before, _, _ := strings.Cut(readFile(t, conf), "userdb {")
	writeFile(t, conf, before+"userdb {\n  driver = passwd-file\n  args = "+list+"\n}\n")
}
