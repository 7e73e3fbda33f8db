package integration

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// etcdCluster is three members of a real etcd.
type etcdCluster struct {
	dir     string
	members []*daemon
	argv    [][]string
	urls    []string
	tls     string // what posthouse is to know of it
}

// newEtcd starts a cluster and ends it with the test.
func newEtcd(t *testing.T) *etcdCluster { return startEtcd(t, "http") }

// newSecureEtcd is newEtcd with TLS. It asks its clients for certificates.
func newSecureEtcd(t *testing.T) *etcdCluster {
	e := startEtcd(t, "https")
	cert, key := lab.ca.issue(t, e.dir, "frontend", "127.0.0.1")
	e.tls = fmt.Sprintf(", tls: {ca: %s, cert: %s, key: %s}", lab.ca.file, cert, key)
	return e
}

func startEtcd(t *testing.T, scheme string) *etcdCluster {
	t.Helper()
	dir := newDir(t, "etcd")
	var cluster []string
	var hosts []string
	for i := range 3 {
		hosts = append(hosts, nextHost())
		cluster = append(cluster, fmt.Sprintf("e%d=http://%s:2380", i, hosts[i]))
	}
	e := &etcdCluster{dir: dir, members: make([]*daemon, 3)}
	for i, host := range hosts {
		client, peer := scheme+"://"+host+":2379", "http://"+host+":2380"
		e.urls = append(e.urls, client)
		var secure []string
		if scheme == "https" {
			cert, key := lab.ca.issue(t, newDir(t, "etcd-tls"), "etcd", host)
			secure = []string{"--cert-file", cert, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", lab.ca.file}
		}
		e.argv = append(e.argv, append([]string{"etcd", "--name", fmt.Sprint("e", i), "--data-dir", filepath.Join(dir, fmt.Sprint("e", i)),
			"--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
			"--initial-advertise-peer-urls", peer, "--initial-cluster-state", "new", "--initial-cluster", strings.Join(cluster, ","),
			"--auto-compaction-retention", "1"}, secure...))
	}
	e.start(t)
	t.Cleanup(func() { e.stop(t) })
	return e
}

// start starts the members that do not run.
func (e *etcdCluster) start(t testing.TB) {
	t.Helper()
	for i, argv := range e.argv {
		if m := e.members[i]; m == nil || !m.running() {
			e.members[i] = startDaemon(t, argv[2], e.dir, argv...)
		}
	}
}

// stop kills all members, as a power failure does.
func (e *etcdCluster) stop(t testing.TB) { e.lose(t, len(e.members)) }

// lose kills some members; two are the quorum.
func (e *etcdCluster) lose(t testing.TB, n int) {
	t.Helper()
	for _, m := range e.members[:n] {
		if m.running() {
			m.kill()
		}
	}
}

// shared puts the site's table into etcd: its frontends are on hosts of their
// own, each with a state directory.
func (s *site) shared(e *etcdCluster, lease string) *site {
	s.store = fmt.Sprintf("{type: etcd, endpoints: [%q, %q, %q], lease: %s%s}", e.urls[0], e.urls[1], e.urls[2], lease, e.tls)
	return s
}

// TestSwitchOnThreeHosts: three frontends with a real etcd between them and a
// Cyrus pair behind. Each has sessions; a switch that is asked of one ends all of
// them and opens on b everywhere, ten times back and forth, with clients that
// work and log in all the time.
func TestSwitchOnThreeHosts(t *testing.T) {
	users := userNames(12)
	pair := newCyrusPair(t, users...)
	s := newSite(t, pair.a.backend(), pair.b.backend(), users...).shared(newEtcd(t), "3s")
	frontends := []*posthouse{startFrontend(t, s), startFrontend(t, s), startFrontend(t, s)}

	var crowds [3]crowd
	for i, p := range frontends {
		crowds[i].calm = true // nothing here waits for the replication
		crowds[i].start(p, users[4*i:4*i+4])
		t.Cleanup(crowds[i].stop)
	}
	for i := range crowds {
		crowds[i].everybodyLogsIn(t, time.Now().Add(-time.Minute))
	}
	var took []time.Duration
	for i := range 10 {
		to := []string{"b", "a"}[i%2]
		began := time.Now() // who logs in after it was ended by the switch
		result := frontends[i%3].switchTo(t, to)
		mustOpen(t, result)
		took = append(took, result.took)
		for _, p := range frontends {
			within(t, 5*time.Second, p.name+" sees "+to, func() bool { r := p.role(t); return r.Active == to && r.Phase == "open" })
		}
		for i := range crowds {
			crowds[i].everybodyLogsIn(t, began)
		}
	}
	for i := range crowds {
		crowds[i].stop()
		for _, complaint := range crowds[i].complaints {
			t.Error(complaint)
		}
	}
	mustNotOverlap(t, pair.a, pair.b)
	slices.Sort(took)
	t.Logf("from command to its end: median %v, longest %v", took[len(took)/2], took[len(took)-1])
}

// TestEtcdAway: with etcd stopped, live sessions and new logins go on, a switch
// is refused with the reason, and works when etcd is back. It wants certificates:
// a frontend without one does not start.
func TestEtcdAway(t *testing.T) {
	t.Parallel()
	users := userNames(2)
	pair := newCyrusPair(t, users...)
	etcd := newSecureEtcd(t)
	s := paced(newSite(t, pair.a.backend(), pair.b.backend(), users...)).shared(etcd, "3s")
	first, second := startFrontend(t, s), startFrontend(t, s)
	stranger := *s
	stranger.store = strings.Replace(s.store, etcd.tls, fmt.Sprintf(", tls: {ca: %s}", lab.ca.file), 1)
	third := newFrontend(t, &stranger)
	third.start(t)
	within(t, 60*time.Second, "a frontend without a certificate ends", func() bool { return !third.running() })
	if log := third.output.String(); !strings.Contains(log, "certificate") {
		t.Errorf("it does not say why: %s", log)
	}
	live := first.as(t, users[0])

	etcd.stop(t)
	mustAnswer(t, live)
	mustAnswer(t, second.as(t, users[1]))
	result := first.switchTo(t, "b")
	mustFail(t, result, "etcd")
	mustAnswer(t, live)

	etcd.start(t)
	within(t, 30*time.Second, "a switch works again", func() bool { return first.switchTo(t, "b").code == 0 })
	within(t, 5*time.Second, "the second follows", func() bool { return second.role(t).Active == "b" })
	mustNotOverlap(t, pair.a, pair.b)
}

// TestFrontendOfAnotherHostDies: nobody can know whether it is down or cut off, so
// that a switch is refused until the operator has said so; what it left behind
// is a residue then.
func TestFrontendOfAnotherHostDies(t *testing.T) {
	t.Parallel()
	users := userNames(2)
	pair := newCyrusPair(t, users...)
	s := paced(newSite(t, pair.a.backend(), pair.b.backend(), users...)).shared(newEtcd(t), "3s")
	first, second := startFrontend(t, s), startFrontend(t, s)
	first.as(t, users[0])
	second.as(t, users[1])

	// Stopped past its lease and awake again, it is the same frontend still.
	must(t, syscall.Kill(second.pid(), syscall.SIGSTOP))
	t.Cleanup(func() { syscall.Kill(second.pid(), syscall.SIGCONT) })
	id := ""
	within(t, 15*time.Second, "the second is silent", func() bool {
		for _, f := range first.frontends(t) {
			if !f.Own && !f.Alive {
				id = f.ID
			}
		}
		return id != ""
	})
	mustFail(t, first.switchTo(t, "b"), "no report from frontend "+id)
	must(t, syscall.Kill(second.pid(), syscall.SIGCONT))
	within(t, 10*time.Second, "the second is back", func() bool {
		return !slices.ContainsFunc(first.frontends(t), func(f frontendView) bool { return !f.Alive })
	})
	if _, stderr, code := first.cli(t, "fence-frontend", id, "--confirmed-down"); code != 1 || !strings.Contains(stderr, "shows life") {
		t.Errorf("fencing one that is alive: %d %s", code, stderr)
	}

	second.kill()
	within(t, 15*time.Second, "the second is silent", func() bool {
		_, _, code := first.cli(t, "fence-frontend", id, "--confirmed-down")
		return code == 0
	})
	mustFail(t, first.switchTo(t, "b"), "residue", id)
	first.mustBeOn(t, "a")
	within(t, 10*time.Second, "a has finished with the second's", func() bool { return len(pair.a.openVisits(t)) <= 1 })
	mustOpen(t, first.switchTo(t, "b", "--confirmed-clean"))
	first.mustBeOn(t, "b")
	mustNotOverlap(t, pair.a, pair.b)
}

// TestSafety10LeasedFrontend: with `fencing: leased` one that is silent for longer
// than its lease counts as ended, and the demote hook ends what its sockets may
// still do. Awake again it ends its sessions, takes a new registration and
// follows. One that is cut off from etcd ends its sessions in time by itself.
func TestSafety10LeasedFrontend(t *testing.T) {
	t.Parallel()
	users := userNames(3)
	h, a, b := newHookedPair(t, users...)
	etcd := newEtcd(t)
	s := newSite(t, a.backend(), b.backend(), users...).shared(etcd, "6s")
	s.limits = "drain_timeout: 2s, switch_budget: 15s"
	s.more = append(s.more, "fencing: leased")
	s.useHooks(h)
	first, second := startFrontend(t, s), startFrontend(t, s)
	onSecond := second.as(t, users[1])

	must(t, syscall.Kill(second.pid(), syscall.SIGSTOP))
	t.Cleanup(func() { syscall.Kill(second.pid(), syscall.SIGCONT) })
	within(t, 30*time.Second, "a switch opens without the second", func() bool { return first.switchTo(t, "b").code == 0 })
	mustAnswer(t, first.as(t, users[1])) // on b, and a's process for it was ended
	must(t, syscall.Kill(second.pid(), syscall.SIGCONT))
	if _, _, err := onSecond.imap(10*time.Second, "NOOP"); err == nil {
		t.Error("a session on the old active goes on")
	}
	within(t, 20*time.Second, "the second has registered anew", func() bool {
		list := first.frontends(t)
		return len(list) == 2 && !slices.ContainsFunc(list, func(f frontendView) bool { return !f.Alive })
	})
	mustAnswer(t, second.as(t, users[2]))
	mustNotOverlap(t, a.cyrus, b.cyrus)

	live := first.as(t, users[0])
	mustAnswer(t, live)
	etcd.stop(t)
	within(t, 10*time.Second, "the sessions end before the lease", func() bool {
		_, _, err := live.imap(5*time.Second, "NOOP")
		return err != nil
	})
	etcd.start(t)
	within(t, 30*time.Second, "logins go on", func() bool {
		w, err := imapLogin(first.imap(), first.name, users[0], password, 25*time.Second)
		if err != nil {
			return false
		}
		w.Close()
		return true
	})
}

// mustAnswer: the session is alive.
func mustAnswer(t testing.TB, w *wire) {
	t.Helper()
	if _, _, err := w.imap(10*time.Second, "NOOP"); err != nil {
		t.Fatalf("NOOP: %v", err)
	}
}

type frontendView struct {
	ID    string
	Alive bool
	Own   bool
}

func (p *posthouse) frontends(t testing.TB) []frontendView {
	t.Helper()
	var list []frontendView
	p.ask(t, &list, "frontends")
	return list
}
