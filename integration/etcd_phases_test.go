package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// outages is a site that loses etcd in the middle of its switches. Its backends
// serve whoever comes, at any time, and write it down; its hooks do nothing, for as
// long as the test wants.
type outages struct {
	dir       string // of the hooks
	etcd      *etcdCluster
	frontends []*posthouse
	a, b      *recorder
	active    string
	away      []span
}

// outageWindow is how long a login waits.
const outageWindow = 11 * time.Second

// gatedHook begins, and ends once its gate is open: as long as the file shut.STEP
// exists it does not. With fails.STEP it fails.
const gatedHook = `#!/bin/sh
echo "$POSTHOUSE_ATTEMPT" >>$DIR/begun.$1
while [ -e $DIR/shut.$1 ]; do sleep 0.02; done
[ ! -e $DIR/fails.$1 ]
`

func newOutages(t *testing.T, users []string) *outages {
	t.Helper()
	o := &outages{dir: newDir(t, "gates-"), etcd: newEtcd(t), active: "a"}
	roleOf := map[string]string{}
	for _, user := range users {
		roleOf[user] = "ma01"
	}
	o.a, o.b = newRecorder(t, "a", nextHost(), roleOf), newRecorder(t, "b", nextHost(), roleOf)
	s := newSite(t, o.a.backend(), o.b.backend(), users...).shared(o.etcd, "2s")
	s.limits = fmt.Sprintf("hold_window: %v, switch_budget: 9s, undo_reserve: 2s, drain_timeout: 6s", outageWindow)
	script := filepath.Join(o.dir, "hook")
	must(t, os.WriteFile(script, []byte(strings.ReplaceAll(gatedHook, "$DIR", o.dir)), 0o755))
	var hooks []string
	for _, step := range []string{"demote", "catch_up", "promote", "undo_promote", "undo_demote"} {
		hooks = append(hooks, fmt.Sprintf("%s: [%s, %s]", step, script, step))
	}
	s.hooks = ", hooks: {" + strings.Join(hooks, ", ") + "}"
	o.frontends = []*posthouse{startFrontend(t, s), startFrontend(t, s)}
	t.Cleanup(func() { o.etcd.start(t) }) // they want to say goodbye
	return o
}

func (o *outages) shut(t testing.TB, step string) {
	writeFile(t, filepath.Join(o.dir, "shut."+step), "")
}

func (o *outages) open(t testing.TB, step string) {
	t.Helper()
	must(t, os.Remove(filepath.Join(o.dir, "shut."+step)))
}

// begun is how often a hook has begun.
func (o *outages) begun(step string) int {
	raw, _ := os.ReadFile(filepath.Join(o.dir, "begun."+step))
	return strings.Count(string(raw), "\n")
}

// waited is how the login of one who had to wait has ended.
type waited struct {
	err  error
	took time.Duration
}

// isTold: he was told to try again, when his time was over.
func (w waited) isTold() bool {
	return w.err != nil && strings.Contains(w.err.Error(), "[UNAVAILABLE]") && w.took >= outageWindow
}

// knock logs in at every frontend, as another user at each.
func (o *outages) knock(users []string) chan waited {
	ends := make(chan waited, len(o.frontends))
	for i, p := range o.frontends {
		go func() {
			began := time.Now()
			w, err := imapLogin(p.imap(), p.name, users[i], password, 30*time.Second)
			ends <- waited{err, time.Since(began)}
			if err == nil {
				w.imap(5*time.Second, "LOGOUT")
				w.Close()
			}
		}()
	}
	return ends
}

// TestSafety15EtcdStops: etcd, or its quorum, stops while a switch is in HOLD before
// the acks, in DEMOTE, CATCH UP, PROMOTE or ABORT. Nobody opens; who waits goes on
// waiting, and is told to try again when his time is over. When etcd is back the
// switch goes on where it was, or is turned back, and who still waits is served.
func TestSafety15EtcdStops(t *testing.T) {
	t.Parallel()
	for _, phases := range [][]string{{"hold", "demote", "catch-up"}, {"abort", "promote"}} {
		t.Run(strings.Join(phases, ", "), func(t *testing.T) {
			t.Parallel()
			users := userNames(3)
			o := newOutages(t, users)
			for _, phase := range phases {
				began := time.Now()
				o.round(t, phase, users)
				t.Logf("etcd away in %s: open on %s, quiet again after %v", phase, o.active, time.Since(began).Round(time.Millisecond))
			}
			mustOpen(t, o.frontends[1].switchTo(t, other[o.active]))
			o.judge(t)
		})
	}
}

var other = map[string]string{"a": "b", "b": "a"}

// round asks for a switch and takes etcd away in the phase. In PROMOTE it stays
// away until those who wait have been told to try again.
func (o *outages) round(t *testing.T, phase string, users []string) {
	t.Helper()
	to, before := other[o.active], o.frontends[0].mustBeOn(t, o.active).Epoch
	step, letGo := strings.ReplaceAll(phase, "-", "_"), func() {}
	live := o.frontends[1].as(t, users[2])
	switch phase {
	case "hold": // whoever is inside on the active does not get out
		letGo = map[string]*recorder{"a": o.a, "b": o.b}[o.active].detain()
		t.Cleanup(letGo)
	case "abort":
		step = "undo_demote"
		writeFile(t, filepath.Join(o.dir, "fails.catch_up"), "")
		o.shut(t, step)
	default:
		o.shut(t, step)
	}
	known := o.begun(step)
	ended := o.frontends[0].startSwitch(t, to)
	is := func(p *posthouse) bool { r := p.role(t); return r.Phase == phase && r.Active == o.active }
	for _, p := range o.frontends {
		within(t, 10*time.Second, p.name+" is in "+phase, func() bool { return is(p) && (phase == "hold" || o.begun(step) > known) })
	}
	waits := o.knock(users)
	for _, p := range o.frontends {
		within(t, 5*time.Second, "a login waits at "+p.name, func() bool {
			return slices.ContainsFunc(p.sessions(t), func(s sessionView) bool { return strings.Contains(s.Action, "waiting") })
		})
	}

	complaints, resigned := o.complaints(), o.resigned()
	if phase == "demote" || phase == "abort" {
		o.etcd.lose(t, 2)
	} else {
		o.etcd.lose(t, 3)
	}
	away := span{from: time.Now()}
	switch phase {
	case "hold":
		letGo()
		must(t, live.farewell(10*time.Second))
	case "demote", "abort":
		o.open(t, step) // nobody can write down that it is done
	case "promote":
		o.mustBeTurnedAway(t, waits)
	case "catch-up": // its driver ends the hook, as another one may drive by now
		within(t, 10*time.Second, "the driver resigns", func() bool { return o.resigned() > resigned })
	}
	remains(t, 500*time.Millisecond, "nobody opens, and who waits goes on waiting", func() bool {
		return is(o.frontends[0]) && is(o.frontends[1]) && (phase == "promote" || len(waits) == 0)
	})
	within(t, 10*time.Second, "both say that etcd is away", func() bool {
		now := o.complaints()
		return now[0] > complaints[0] && now[1] > complaints[1]
	})
	away.to = time.Now()
	o.away = append(o.away, away)
	o.etcd.start(t)
	for _, name := range []string{"shut." + step, "fails.catch_up"} {
		os.Remove(filepath.Join(o.dir, name)) // not all are there
	}
	var r roleView
	for _, p := range o.frontends {
		within(t, 40*time.Second, p.name+" has the role open", func() bool { r = p.role(t); return r.Phase == "open" })
	}
	want := map[bool]uint64{true: before + 1, false: before + 2}[r.Active == to]
	if result := <-ended; r.Epoch != want || (result.code == 0) != (r.Active == to) {
		t.Errorf("%s serves in epoch %d, want %d: %v", r.Active, r.Epoch, want, result)
	}
	o.active = r.Active
	if phase == "promote" {
		return
	}
	for range o.frontends {
		if w := <-waits; w.err != nil && !w.isTold() {
			t.Errorf("a login, after %v: %v", w.took, w.err)
		}
	}
}

// mustBeTurnedAway: those who wait are told to try again, and the log says for what
// they have waited.
func (o *outages) mustBeTurnedAway(t testing.TB, waits chan waited) {
	t.Helper()
	for range o.frontends {
		if w := <-waits; !w.isTold() {
			t.Errorf("a login, after %v: %v", w.took, w.err)
		}
	}
	for _, p := range o.frontends {
		within(t, 5*time.Second, p.name+" says why it refused a login", func() bool {
			return len(p.lines("login refused", "waiting for role ma01", "role is on hold")) > 0
		})
	}
}

// complaints is how often each frontend has said in its log that etcd is away.
func (o *outages) complaints() (n [2]int) {
	for i, p := range o.frontends {
		n[i] = len(p.lines("etcd at", `"level":"error"`)) + len(p.lines("etcd at", `"level":"warn"`, "trying on"))
	}
	return n
}

// resigned is how often a driver has given up its office with a hook at work.
func (o *outages) resigned() (n int) {
	for _, p := range o.frontends {
		n += min(len(p.lines("does not drive switches any more")), len(p.lines("hook ended with its driver's office")))
	}
	return n
}

// judge: nobody was let in while etcd was away, and no user was on both.
func (o *outages) judge(t *testing.T) {
	t.Helper()
	visitsA, mailA := o.a.records()
	visitsB, mailB := o.b.records()
	for _, v := range slices.Concat(visitsA, visitsB) {
		if slices.ContainsFunc(o.away, func(s span) bool { return v.from.After(s.from) && v.from.Before(s.to) }) {
			t.Errorf("let in while etcd was away: %v", v)
		}
	}
	if both := onBoth(slices.Concat(visitsA, visitsB, mailA, mailB), itself); len(both) > 0 {
		t.Errorf("users on both:\n%s", strings.Join(both, "\n"))
	}
}
