package integration

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// drivenSite is three frontends on hosts of their own, etcd between them and a
// mirrored Cyrus pair with the shipped hooks, one of which drives a switch and
// may die of it.
type drivenSite struct {
	*witness
	*mirrored
	a, b hookedCyrus
}

// newDrivenSite starts all of it, with clients and MTAs at work.
func newDrivenSite(t *testing.T) *drivenSite {
	t.Helper()
	users := userNames(6)
	h, a, b := newHookedPair(t, users...)
	s := takesMail(newSite(t, a.backend(), b.backend(), users...)).shared(newEtcd(t), "2s")
	s.limits = "hold_window: 28s, switch_budget: 25s, entry_rate: 5000"
	s.hooks = h.yaml(filepath.Join(h.dir, "patient")) // a site's own, in front of the shipped ones
	d := &drivenSite{a: a, b: b, witness: &witness{users: users},
		mirrored: &mirrored{role: "ma01", active: "a", standby: "b", users: users, hooks: h, servers: map[string]hookedCyrus{"a": a, "b": b}}}
	for range 3 {
		p := newFrontend(t, s)
		p.start(t)
		d.frontends = append(d.frontends, p)
	}
	for _, p := range d.frontends {
		p.ready(t)
	}
	d.witness.start(t)
	return d
}

// driver waits until somebody has begun this hook oftener than known, and says who.
func (d *drivenSite) driver(t testing.TB, hook string, known map[*posthouse]int) *posthouse {
	t.Helper()
	var found *posthouse
	within(t, 20*time.Second, "somebody runs "+hook, func() bool {
		for p, n := range d.begun(hook) {
			if n > known[p] {
				found = p
			}
		}
		return found != nil
	})
	return found
}

// begun is how often each frontend has begun a hook so far.
func (d *drivenSite) begun(hook string) map[*posthouse]int {
	n := map[*posthouse]int{}
	for _, p := range d.frontends {
		n[p] = len(p.lines(`"hook begins"`, `"hook":"`+hook+`"`))
	}
	return n
}

// dies kills a frontend that is within a hook. The hook goes on, as one that hangs
// in ssh on another host would, unless it is to end too, as systemd has it.
func (d *drivenSite) dies(t testing.TB, p *posthouse, hook string, withHook bool) {
	t.Helper()
	d.mu.Lock()
	d.dying = p
	d.mu.Unlock()
	done := len(p.lines(`"hook done"`, `"hook":"`+hook+`"`)) + len(p.lines(`"hook failed"`, `"hook":"`+hook+`"`))
	if done != d.begun(hook)[p]-1 {
		t.Fatalf("%s is not within %s", p.name, hook)
	}
	if withHook {
		p.kill()
		return
	}
	must(t, syscall.Kill(p.pid(), syscall.SIGKILL))
	<-p.done
	if !slices.ContainsFunc(p.family(), func(q process) bool { return strings.HasSuffix(strings.TrimSpace(q.command), " "+hook) }) {
		t.Fatalf("the %s hook of %s has ended with it: %v", hook, p.name, p.family())
	}
}

// rises starts a frontend again that was killed, and waits until the others have
// buried what it was.
func (d *drivenSite) rises(t testing.TB, p *posthouse) {
	t.Helper()
	p.start(t)
	p.ready(t)
	for _, p := range d.frontends {
		within(t, 30*time.Second, p.name+" counts three frontends", func() bool {
			list := p.frontends(t)
			return len(list) == 3 && !slices.ContainsFunc(list, func(f frontendView) bool { return !f.Alive })
		})
	}
	d.mu.Lock()
	d.dying = nil
	d.mu.Unlock()
}

// settles waits until every frontend has the role open on backend, and everybody
// has been in and appended since.
func (d *drivenSite) settles(t testing.TB, backend string) {
	t.Helper()
	for _, p := range d.frontends {
		if !p.running() {
			continue
		}
		var r roleView
		if !becomes(40*time.Second, func() bool { r = p.role(t); return r.Phase == "open" && r.Active == backend }) {
			t.Fatalf("%s has the role %s on %s, want it open on %s", p.name, r.Phase, r.Active, backend)
		}
	}
	if d.active != backend {
		d.active, d.standby = d.standby, d.active
	}
	d.servers[d.active].mustBe(t, "master")
	d.servers[d.standby].mustBe(t, "replica")
	seen := d.session()
	within(t, 60*time.Second, "everybody has been in and appended since", func() bool { return d.everybodySince(seen) || d.complained() })
}

// judge ends the load and compares what it was told with what the active has.
func (d *drivenSite) judge(t testing.TB) {
	t.Helper()
	d.stop()
	for _, complaint := range d.complaints {
		t.Error(complaint)
	}
	uids := d.compare(t, d.servers[d.active], d.mirrored.users)
	mustNotOverlap(t, d.a.cyrus, d.b.cyrus)
	if uids == 0 {
		t.Error("no UID was compared: this run proves nothing")
	}
	t.Logf("%d messages acknowledged, %d UIDs compared; %d logins", len(d.acked), uids, d.logins)
}

// TestDriverDiesInAHook: who drives a switch is killed within demote, within
// catch_up and within promote. Another one takes the switch over, whose hook waits
// for the dead one's or does again what that had begun, and the role opens. All
// that was acknowledged is on the new active under its UID, and nobody is refused
// by the frontends that live.
func TestDriverDiesInAHook(t *testing.T) {
	t.Parallel()
	d := newDrivenSite(t)
	slow, slowMaster := filepath.Join(d.hooks.dir, "slow"), filepath.Join(d.hooks.dir, "slow.master")
	for _, round := range []struct {
		hook     string
		withHook bool
	}{{"demote", false}, {"catch_up", true}, {"promote", false}} {
		from, to := d.servers[d.active], d.servers[d.standby]
		var release func()
		var within func() bool // the shipped hook is in the middle of its work
		switch round.hook {
		case "demote":
			writeFile(t, slow, "")
			release = func() { os.Remove(slow) }
			within = func() bool { return len(from.processes()) == 0 }
		case "catch_up":
			release = to.standStill(t) // it takes nothing
			within = func() bool { return from.runs("sync_client ", " -o ") }
		case "promote":
			writeFile(t, slowMaster, "")
			release = func() { os.Remove(slowMaster) }
			within = func() bool { return len(to.processes()) == 0 }
		}
		known := d.begun(round.hook)
		ended := d.frontends[0].startSwitch(t, d.standby)
		victim := d.driver(t, round.hook, known)
		if !becomes(10*time.Second, within) {
			t.Fatalf("%s does not get on", round.hook)
		}
		d.dies(t, victim, round.hook, round.withHook)
		known[victim] = math.MaxInt
		heir := d.driver(t, round.hook, known)
		release()
		result := <-ended
		if victim != d.frontends[0] {
			mustOpen(t, result)
		}
		d.settles(t, d.standby)
		t.Logf("%s died within %s (killed too: %t), %s took over: %v", victim.name, round.hook, round.withHook, heir.name, lastLine(result.said))
		d.rises(t, victim)
	}
	d.judge(t)
}

// standStill stops every process of the instance.
func (c hookedCyrus) standStill(t testing.TB) (thaw func()) {
	t.Helper()
	stopped := c.processes()
	for _, p := range stopped {
		must(t, syscall.Kill(p.pid, syscall.SIGSTOP))
	}
	thaw = sync.OnceFunc(func() {
		for _, p := range stopped {
			syscall.Kill(p.pid, syscall.SIGCONT)
		}
	})
	t.Cleanup(thaw)
	return thaw
}

// runs says whether the instance has a process with all of words in its command
// line.
func (c hookedCyrus) runs(words ...string) bool {
	return slices.ContainsFunc(c.processes(), func(p process) bool {
		return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(p.command, word) })
	})
}

// TestSafety17OrphanedHooks: who drives a switch is killed while its hook hangs,
// once before the shipped hook, in what the site has put in front of it, and once
// within, on the way to b's host. The operator turns the switch back. What the
// orphans want when they go on, the one after later switches, is refused on each
// backend's host: nobody's session ends, and a is the only master.
func TestSafety17OrphanedHooks(t *testing.T) {
	t.Parallel()
	d := newDrivenSite(t)
	file := func(name string) string { return filepath.Join(d.hooks.dir, name) }
	exists := func(name string) func() bool {
		return func() bool { _, err := os.Stat(file(name)); return err == nil }
	}
	// orphan leaves one behind and has the switch turned back.
	orphan := func(hook, hangs string) {
		t.Helper()
		known, before := d.begun(hook), d.frontends[0].role(t).Epoch
		writeFile(t, file("hang."+hangs), "")
		d.frontends[0].startSwitch(t, "b")
		within(t, 20*time.Second, hook+" hangs", exists("hangs."+hangs))
		victim := d.driver(t, hook, known)
		d.dies(t, victim, hook, false)
		other := d.frontends[(slices.Index(d.frontends, victim)+1)%3]
		mustOpen(t, other.verb(t, "switch", "--abort", "ma01", "--reason", t.Name()))
		d.settles(t, "a")
		if r := other.mustBeOn(t, "a"); r.Epoch != before+2 {
			t.Errorf("epoch %d after the abort, want %d", r.Epoch, before+2)
		}
		d.rises(t, victim)
	}
	// goesOn lets an orphan go on while users work on a.
	goesOn := func(hangs string, words ...string) {
		t.Helper()
		master, live := d.a.master(t), d.frontends[1].as(t, d.mirrored.users[0])
		must(t, os.Remove(file("hangs."+hangs)))
		within(t, 20*time.Second, "the orphan has ended", exists("said."+hangs))
		for _, word := range words {
			if !strings.Contains(readFile(t, file("said."+hangs)), word) {
				t.Errorf("the orphan does not say %q: %s", word, readFile(t, file("said."+hangs)))
			}
		}
		mustAnswer(t, live)
		if now := d.a.master(t); now != master {
			t.Errorf("the orphan has restarted a: %d, then %d", master, now)
		}
		d.settles(t, "a")
	}

	orphan("promote", "remote")
	goesOn("remote", "refused: promote of ma01", "has seen undo_demote", "exit status 1")
	orphan("demote", "demote")
	mustOpen(t, d.frontends[0].switchTo(t, "b"))
	mustOpen(t, d.frontends[0].switchTo(t, "a"))
	goesOn("demote", "refused: demote of ma01", "exit status 1")
	d.judge(t)
}
