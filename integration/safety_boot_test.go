package integration

import (
	"slices"
	"testing"
	"time"
)

// TestSafety07CutOffAndBack: a frontend is cut off from etcd, serves on, and loses
// its power; the operator says that it is down, and the role is switched. Started
// again where it cannot reach etcd it has the old table on its disk, in the boot in
// which that was written, and serves nobody. When it reaches etcd it is another
// frontend, and serves from b.
func TestSafety07CutOffAndBack(t *testing.T) {
	t.Parallel()
	l, users := newLan(t), userNames(2)
	roleOf := map[string]string{users[0]: "ma01", users[1]: "ma01"}
	a, b := newRecorder(t, "a", l.server(t), roleOf), newRecorder(t, "b", l.server(t), roleOf)
	cluster, etcdHosts := l.etcd(t)
	s := paced(newSite(t, distant(a.backend()), distant(b.backend()), users...)).shared(cluster, "2s")
	all := l.frontends(t, s)
	first, cut := all[0], all[2]
	was := cut.ownID(t)
	live := cut.as(t, users[0])

	cut.home.cut(t, etcdHosts...)
	within(t, 15*time.Second, "it is silent", func() bool {
		return slices.ContainsFunc(first.frontends(t), func(f frontendView) bool { return f.ID == was && !f.Alive })
	})
	mustAnswer(t, live)
	mustAnswer(t, cut.as(t, users[1])) // it cannot know
	cut.kill()
	if _, stderr, code := first.cli(t, "fence-frontend", was, "--confirmed-down"); code != 0 {
		t.Fatalf("fence-frontend: exit code %d: %s", code, stderr)
	}
	mustFail(t, first.switchTo(t, "b"), "residue", was)
	within(t, 5*time.Second, "a has nobody left", func() bool { return a.present() == 0 })
	mustOpen(t, first.switchTo(t, "b", "--confirmed-clean"))
	switched := time.Now()

	cut.start(t)
	if w, err := imapLogin(cut.imap(), cut.name, users[0], password, 5*time.Second); err == nil { // it waits for a greeting
		w.Close()
		t.Error("it has let somebody in")
	}
	if !cut.running() {
		t.Error("it has given up already")
	}
	cut.home.mend(t)
	within(t, 30*time.Second, "it serves", func() bool { return len(cut.lines(`"listening"`)) > 0 })
	cut.ready(t)
	cut.mustBeOn(t, "b")
	mustAnswer(t, cut.as(t, users[0]))
	if is := cut.ownID(t); is == was {
		t.Errorf("it has the ID again under which it was fenced: %s", is)
	}
	if list := first.frontends(t); len(list) != 3 || slices.ContainsFunc(list, func(f frontendView) bool { return f.ID == was }) {
		t.Errorf("frontends: %+v", list)
	}

	visitsA, mailA := a.records()
	visitsB, mailB := b.records()
	for _, v := range visitsA {
		if v.from.After(switched) {
			t.Errorf("let in to the old active: %v", v)
		}
	}
	if both := onBoth(slices.Concat(visitsA, visitsB, mailA, mailB), itself); len(both) > 0 || len(visitsA) != 2 || len(visitsB) != 1 {
		t.Errorf("on a %v, on b %v; on both %q", visitsA, visitsB, both)
	}
	mustOpen(t, cut.switchTo(t, "a"))
}

// ownID is the name under which the frontend is registered.
func (p *posthouse) ownID(t testing.TB) string {
	t.Helper()
	list := p.frontends(t)
	i := slices.IndexFunc(list, func(f frontendView) bool { return f.Own })
	if i < 0 {
		t.Fatalf("%s is not one of the frontends: %+v", p.name, list)
	}
	return list[i].ID
}

// present is how many are on the recorder now.
func (r *recorder) present() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.callers {
		if c.user != "" {
			n++
		}
	}
	return n
}
