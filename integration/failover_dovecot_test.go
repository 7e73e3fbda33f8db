package integration

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestFailoverDovecot: b dies with mail that nobody has sent to a. a serves and
// takes more; rejoin brings both together, and then they are equal.
func TestFailoverDovecot(t *testing.T) {
	t.Parallel()
	users := []string{"u0001", "u0002"}
	s, a, b := newHookedDovecots(t)
	for _, d := range []hookedDovecot{a, b} { // from its next start on, which the switch brings
		d.listUsers(t, users)
	}
	a.deliver(t, "u0001", "on both")
	s.change(t, "a", "b", users, nil)
	b.deliver(t, "u0001", "only on b")
	w := b.as(t, "u0002")
	w.ok(t, "CREATE New")
	must(t, w.append(5*time.Second, "New", "only on b, in New"))
	b.die()

	s.number++
	s.must(t, 0, call{step: "fence", from: "b", to: "a", number: s.number, attempt: 1}, "no process of it is left")
	s.must(t, 0, call{step: "promote", to: "a", number: s.number, attempt: 1}, "runs as master")
	s.tableSays(t, "a", "open")
	if has := subjectsOf(t, a, "u0001"); !slices.Equal(has, []string{"on both"}) {
		t.Errorf("u0001 finds %q on a", has)
	}
	a.deliver(t, "u0001", "in between") // its UID is that of the message which is on b only

	rejoin := call{step: "rejoin", from: "a", to: "b", number: s.number, attempt: 1}
	s.must(t, 0, rejoin, "runs as replica", "all users made equal")
	s.must(t, 0, rejoin, "all users made equal")
	b.mustBe(t, s, "replica")
	a.mustBe(t, s, "master")
	has := subjectsOf(t, a, "u0001")
	slices.Sort(has)
	if !slices.Equal(has, []string{"in between", "on both", "only on b"}) {
		t.Errorf("u0001 finds %q on a after the rejoin", has)
	}
	w = a.as(t, "u0002")
	found, err := w.subjects("New")
	if err != nil || !slices.Equal(found, []string{"only on b, in New"}) {
		t.Errorf("u0002 finds %q in New, %v", found, err)
	}
	w.Close()

	want := a.contents(t, "u0001")
	s.change(t, "a", "b", []string{}, nil) // no catch-up: rejoin has to have sent all
	if has := b.contents(t, "u0001"); !slices.Equal(has, want) {
		t.Errorf("on b:\n%q\nwant\n%q", has, want)
	}
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
