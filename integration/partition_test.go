package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestPartitions is what a site goes through in its worst month, in a minute:
// three frontends on machines of their own, an etcd of three members, recording
// backends; logins, APPENDs and LMTP at all frontends, while four roles go back
// and forth. Every other round of switches is hit by a fault: a frontend is cut
// off from etcd, or from backends, is killed, or stands still for longer than its
// lease and wakes.
//
// What must hold, by what the backends themselves have recorded: no user, and no
// role, is on both at once, and none goes from one to the other but by a switch
// that opened; whatever was acknowledged is there. A round without a fault opens
// all roles and refuses no login. In the end all roles are open.
func TestPartitions(t *testing.T) {
	for _, fencing := range []string{"stable", "leased"} {
		t.Run(fencing, func(t *testing.T) {
			t.Parallel()
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			o := newOrdeal(t, fencing, rand.New(rand.NewPCG(seed, 0)))
			o.startLoad()
			o.settle()
			faults := slices.Clone(allFaults)
			o.chance.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
			faults = append(faults, allFaults[o.chance.IntN(len(allFaults))], allFaults[o.chance.IntN(len(allFaults))])
			for i := 0; o.opened() < 50 || len(faults) > 0; i++ {
				f := noFault
				if i%2 == 1 && len(faults) > 0 {
					f, faults = faults[0], faults[1:]
				}
				o.round(f)
				if t.Failed() {
					break
				}
			}
			o.stopLoad()
			o.judge()
		})
	}
}

// fault is what may befall one frontend.
type fault string

const (
	noFault      fault = ""
	cutFromEtcd  fault = "cut off from etcd"
	cutFromHosts fault = "cut off from backends"
	killed       fault = "killed"
	stopped      fault = "stopped"
)

var allFaults = []fault{cutFromEtcd, cutFromHosts, killed, stopped}

// ordeal is a site under load, and what its clients have seen.
type ordeal struct {
	t         *testing.T
	fencing   string
	chance    *rand.Rand // of the test's own goroutine
	frontends []*resident
	a, b      *recorder
	etcdHosts []string
	roleOf    map[string]string
	active    map[string]string // by role, when all was quiet last
	moved     map[string]int    // by role: switches that opened
	back      int               // switches that were refused or turned back
	took      map[bool][]time.Duration
	calm      []span

	quit chan struct{}
	once sync.Once
	work sync.WaitGroup

	mu      sync.Mutex
	logins  int
	refused []refusal
	acked   map[string]bool // user and message
}

type span struct{ from, to time.Time }

// refusal is a login that failed, for whatever reason.
type refusal struct {
	span
	why error
}

func newOrdeal(t *testing.T, fencing string, chance *rand.Rand) *ordeal {
	t.Helper()
	l := newLan(t)
	o := &ordeal{t: t, fencing: fencing, chance: chance, roleOf: map[string]string{}, active: map[string]string{}, moved: map[string]int{},
		took: map[bool][]time.Duration{}, quit: make(chan struct{}), acked: map[string]bool{}}
	users := userNames(8)
	for i, user := range users {
		role := fmt.Sprintf("ma%02d", i%4+1)
		o.roleOf[user], o.active[role] = role, "a"
	}
	o.a, o.b = newRecorder(t, "a", l.server(t), o.roleOf), newRecorder(t, "b", l.server(t), o.roleOf)
	var cluster *etcdCluster
	cluster, o.etcdHosts = l.etcd(t)

	s := newSite(t, distant(o.a.backend()), distant(o.b.backend()), users...).shared(cluster, "3s").takesMailFrom(l)
	s.limits = "hold_window: 20s, drain_timeout: 1s, switch_budget: 12s, undo_reserve: 3s"
	s.more = append(s.more, "fencing: "+fencing)
	s.hooks = o.hooks()
	s.roles = map[string]string{}
	for role := range o.active {
		if role != "ma01" {
			s.roles[role] = "{members: [a, b], active: a" + s.hooks + "}"
		}
		o.b.shut[role] = fencing == "leased"
	}
	for _, user := range users {
		s.users[user] = o.roleOf[user]
	}
	o.frontends = l.frontends(t, s)
	return o
}

// askRecorder is every hook: who is asked for what depends on the step.
const askRecorder = `#!/bin/sh
case $1 in
prove) at=$POSTHOUSE_FROM verb=expel ;;
demote) at=$POSTHOUSE_FROM verb=shut ;;
undo_demote) at=$POSTHOUSE_FROM verb=open ;;
promote) at=$POSTHOUSE_TO verb=open ;;
undo_promote) at=$POSTHOUSE_TO verb=shut ;;
esac
case $at in a) at=$A ;; b) at=$B ;; esac
for role in $POSTHOUSE_ROLES; do
	curl -sSf -m 2 "http://$at/$verb?role=$role&switch=$POSTHOUSE_SWITCH&attempt=$POSTHOUSE_ATTEMPT" || exit 75
done
`

// hooks: with leases an old active is shut at each switch, so that it is no matter
// what a frontend does that wakes too late. With stable fencing nothing is ever
// shut: whoever errs is seen. Residues are cleared by ending what is under way.
func (o *ordeal) hooks() string {
	o.t.Helper()
	o.a.serveHooks(o.t)
	o.b.serveHooks(o.t)
	script := filepath.Join(newDir(o.t, "hook-"), "ask")
	must(o.t, os.WriteFile(script, []byte(strings.NewReplacer("$A ", o.a.host+" ", "$B ", o.b.host+" ").Replace(askRecorder)), 0o755))
	steps := []string{"prove"}
	if o.fencing == "leased" {
		steps = []string{"demote", "promote", "undo_demote", "undo_promote"}
	}
	for i, step := range steps {
		steps[i] = fmt.Sprintf("%s: [%s, %s]", step, script, step)
	}
	return ", scope: role, hooks: {" + strings.Join(steps, ", ") + "}"
}

// startLoad: two clients for each user, that go from frontend to frontend, and an
// MTA at each frontend.
func (o *ordeal) startLoad() {
	for i, user := range slices.Concat(slices.Sorted(maps.Keys(o.roleOf)), slices.Sorted(maps.Keys(o.roleOf))) {
		o.work.Go(func() { o.client(user, i) })
	}
	for _, p := range o.frontends {
		o.work.Go(func() { o.mta(p) })
	}
	o.t.Cleanup(o.stopLoad)
}

func (o *ordeal) stopLoad() {
	o.once.Do(func() { close(o.quit) })
	o.work.Wait()
}

// pause is a client's; false says that all is over.
func (o *ordeal) pause(d time.Duration) bool {
	select {
	case <-o.quit:
		return false
	case <-time.After(d):
		return true
	}
}

// client logs in here and there and appends until it is sent away or has had
// enough.
func (o *ordeal) client(user string, first int) {
	for n := first; o.pause(20 * time.Millisecond); n++ {
		p := o.frontends[n%len(o.frontends)]
		began := time.Now()
		w, err := imapLogin(p.imap(), p.name, user, password, 30*time.Second)
		o.mu.Lock()
		if o.logins++; err != nil {
			o.refused = append(o.refused, refusal{span{began, time.Now()}, fmt.Errorf("%s at %s: %w", user, p.name, err)})
		}
		o.mu.Unlock()
		if err != nil {
			o.pause(200 * time.Millisecond)
			continue
		}
		for i := range 20 {
			subject := fmt.Sprintf("append-%d-%d-%d", first, n, i)
			if w.append(20*time.Second, "INBOX", subject) != nil {
				break
			}
			o.acknowledged(user, subject)
			o.pause(100 * time.Millisecond)
		}
		w.imap(5*time.Second, "LOGOUT")
		w.Close()
	}
}

// mta delivers to two users at a time, whose roles differ, and tries again until
// it has a final answer for both.
func (o *ordeal) mta(p *resident) {
	users := slices.Sorted(maps.Keys(o.roleOf))
	l := &loader{address: p.lmtp()}
	var c *lmtp
	for n := 0; o.pause(60 * time.Millisecond); n++ {
		mail := newParcel(at("example.org", users[n%len(users)], users[(n+1+n/len(users)%3)%len(users)])...)
		for len(mail.open()) > 0 && o.pause(30*time.Millisecond) {
			c = l.attempt(c, mail)
			for _, rcpt := range mail.rcpts {
				if mail.last(rcpt).accepted() {
					o.acknowledged(localPart(rcpt), mail.id)
				}
			}
		}
	}
	if c != nil {
		c.Close()
	}
}

func (o *ordeal) acknowledged(user, message string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.acked[user+" "+message] = true
}

// round asks for a switch of every role, each of some frontend, lets the fault
// happen meanwhile, and waits until all is quiet.
func (o *ordeal) round(f fault) {
	o.t.Helper()
	began := time.Now()
	before := maps.Clone(o.active)
	ends := map[string]chan switchResult{}
	for role, active := range before {
		to := map[string]string{"a": "b", "b": "a"}[active]
		p, ended := o.frontends[o.chance.IntN(len(o.frontends))], make(chan switchResult, 1)
		ends[role] = ended
		go func() {
			asked := time.Now()
			stdout, stderr, code := p.cli(o.t, "switch", role, "--to", to, "--reason", string(f))
			ended <- switchResult{code, stdout + stderr, time.Since(asked)}
		}()
	}
	if f != noFault {
		o.pause(time.Duration(o.chance.IntN(300)) * time.Millisecond)
		o.strike(f)
	}
	said := map[string]switchResult{}
	for role, ended := range ends {
		said[role] = <-ended
	}
	o.settle()
	opened := 0
	for role, was := range before {
		if o.active[role] != was {
			opened++
			o.moved[role]++
			o.took[f == noFault] = append(o.took[f == noFault], said[role].took)
			continue
		}
		o.back++
		if f == noFault {
			o.t.Errorf("without a fault %s was not switched: %v", role, said[role])
		}
	}
	if f == noFault {
		o.calm = append(o.calm, span{began, time.Now()})
	} else {
		o.t.Logf("%s: %d of %d switches opened, quiet again after %v", f, opened, len(before), time.Since(began).Round(10*time.Millisecond))
	}
}

// strike lets a fault happen to some frontend and mends it. With leases it is
// always the same one that stands still: only it may knock at a shut door.
func (o *ordeal) strike(f fault) {
	o.t.Helper()
	victim := o.chance.IntN(len(o.frontends))
	if f == stopped {
		victim = o.stands()
	}
	p, other := o.frontends[victim], o.frontends[(victim+1)%len(o.frontends)]
	switch f {
	case cutFromEtcd:
		p.home.cut(o.t, o.etcdHosts...)
		if o.chance.IntN(2) == 0 {
			o.silent(other)
		} else {
			o.pause(time.Second)
		}
		p.home.mend(o.t)
	case cutFromHosts:
		hosts := [][]string{{o.a.host}, {o.b.host}, {o.a.host, o.b.host}}
		p.home.cut(o.t, hosts[o.chance.IntN(len(hosts))]...)
		o.pause(2 * time.Second)
		p.home.mend(o.t)
	case killed:
		p.kill()
		p.start(o.t)
		p.ready(o.t)
	case stopped:
		must(o.t, syscall.Kill(p.pid(), syscall.SIGSTOP))
		wake := sync.OnceFunc(func() { syscall.Kill(p.pid(), syscall.SIGCONT) })
		o.t.Cleanup(wake)
		o.silent(other)
		o.pause(500 * time.Millisecond)
		wake()
	}
}

// stands is the frontend that is stopped, where that matters.
func (o *ordeal) stands() int { return 2 }

// silent waits until p counts one of the others as silent, or as gone.
func (o *ordeal) silent(p *resident) {
	o.t.Helper()
	within(o.t, 30*time.Second, "one frontend is silent", func() bool {
		list := p.frontends(o.t)
		return len(list) < len(o.frontends) || slices.ContainsFunc(list, func(f frontendView) bool { return !f.Alive })
	})
}

// settle waits until every frontend shows all frontends alive and all roles open
// at the same place, and lets somebody of every role in.
func (o *ordeal) settle() {
	o.t.Helper()
	why := ""
	if !becomes(60*time.Second, func() bool { why = o.unrest(); return why == "" }) {
		o.t.Fatalf("no quiet within a minute: %s", why)
	}
}

// unrest says what is not as it should be; with empty words all is well.
func (o *ordeal) unrest() string {
	var first map[string]string
	for _, p := range o.frontends {
		var roles []roleView
		var list []frontendView
		if !answers(o.t, p.posthouse, &roles, "roles") || !answers(o.t, p.posthouse, &list, "frontends") {
			return p.name + " does not answer"
		}
		active := map[string]string{}
		for _, r := range roles {
			if r.Phase != "open" {
				return fmt.Sprintf("%s: %+v", p.name, r)
			}
			active[r.Role] = r.Active
		}
		if len(list) != len(o.frontends) || slices.ContainsFunc(list, func(f frontendView) bool { return !f.Alive }) {
			return fmt.Sprintf("%s: %+v", p.name, list)
		}
		if first == nil {
			first = active
		}
		if !maps.Equal(active, first) {
			return fmt.Sprintf("%s: %v, another: %v", p.name, active, first)
		}
	}
	for _, p := range o.frontends {
		for _, user := range userNames(len(first)) {
			w, err := imapLogin(p.imap(), p.name, user, password, 30*time.Second)
			if err != nil {
				return fmt.Sprintf("%s at %s: %v", user, p.name, err)
			}
			w.Close()
		}
	}
	o.active = first
	return ""
}

// answers is ask for a frontend that may be unable to answer.
func answers(t testing.TB, p *posthouse, answer any, verb string) bool {
	stdout, _, code := p.cli(t, verb)
	return code == 0 && json.Unmarshal([]byte(stdout), answer) == nil
}

func (o *ordeal) opened() int {
	n := 0
	for _, moved := range o.moved {
		n += moved
	}
	return n
}

// judge compares what the clients were told with what the backends recorded.
func (o *ordeal) judge() {
	t := o.t
	t.Helper()
	visitsA, mailA := o.a.records()
	visitsB, mailB := o.b.records()
	mail := slices.Concat(mailA, mailB)
	all := slices.Concat(visitsA, visitsB, mail)
	role := func(user string) string { return o.roleOf[user] }
	users, roles := onBoth(all, itself), onBoth(all, role)
	for what, found := range map[string][]string{"user": users, "role": roles} {
		if len(found) > 0 {
			t.Errorf("%d times a %s was on both:\n%s", len(found), what, strings.Join(found[:min(5, len(found))], "\n"))
		}
	}
	for role, n := range crossings(all, role) {
		if n > o.moved[role] {
			t.Errorf("%s went from one backend to the other %d times, in %d switches", role, n, o.moved[role])
		}
	}
	times := map[string]int{}
	for _, m := range mail {
		times[m.user+" "+m.message]++
	}
	missing, twice := 0, 0
	for message := range o.acked {
		switch times[message] {
		case 0:
			if missing++; missing <= 5 {
				t.Errorf("acknowledged, but nobody has it: %s", message)
			}
		case 1:
		default:
			twice++
		}
	}
	wrongly := 0
	for _, r := range o.refused {
		if slices.ContainsFunc(o.calm, func(s span) bool { return !r.from.Before(s.from) && !r.to.After(s.to) }) {
			if wrongly++; wrongly <= 5 {
				t.Errorf("refused though nothing was wrong: %v", r.why)
			}
		}
	}
	knocks := 0
	for _, host := range slices.Concat(o.a.knocks, o.b.knocks) {
		if knocks++; host != o.frontends[o.stands()].host {
			t.Errorf("%s, which never stood still, came to a backend that was shut", host)
		}
	}
	if len(o.acked) == 0 || len(visitsA) == 0 || len(visitsB) == 0 {
		t.Error("there was no load: this run proves nothing")
	}
	t.Logf("%s: %d switches opened, %d refused or turned back; users on both %d; of %d acknowledged messages missing %d, twice %d; %d logins, "+
		"refused in a round without a fault %d, with one %d; knocks at a shut backend %d; command to end without a fault: %s; with one: %s",
		o.fencing, o.opened(), o.back, len(users), len(o.acked), missing, twice, o.logins, wrongly, len(o.refused)-wrongly, knocks,
		inShort(o.took[true]), inShort(o.took[false]))
}

// inShort is for the reader of a log.
func inShort(took []time.Duration) string {
	if len(took) == 0 {
		return "none"
	}
	slices.Sort(took)
	return fmt.Sprintf("median %v, longest %v", took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
}
