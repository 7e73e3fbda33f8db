package etcdstore

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

func TestMain(m *testing.M) {
	// Most of the time they wait for leases and elections.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// patient bounds waits of a test: what takes longer never comes.
const patient = 30 * time.Second

// server is a member of an etcd cluster.
type server struct {
	t    testing.TB
	name string
	dir  string // of its data
	url  string // for clients
	args []string
	cmd  *exec.Cmd
}

// cluster is some members that know of each other.
type cluster []*server

// newCluster starts n members. They do not fsync: no test is about power losses
// of etcd.
func newCluster(t testing.TB, n int) cluster {
	t.Helper()
	bin, err := exec.LookPath("etcd")
	if err != nil {
		t.Fatal("etcd is missing: apt-get install etcd-server (make deps does it)")
	}
	urls := freeURLs(t, 2*n)
	var c cluster
	var peers []string
	for i := range n {
		name := fmt.Sprint("e", i)
		c = append(c, &server{t: t, name: name, dir: filepath.Join(t.TempDir(), name), url: urls[2*i]})
		peers = append(peers, name+"="+urls[2*i+1])
	}
	for i, m := range c {
		m.args = []string{bin, "--name", m.name, "--data-dir", m.dir,
			"--listen-client-urls", m.url, "--advertise-client-urls", m.url,
			"--listen-peer-urls", urls[2*i+1], "--initial-advertise-peer-urls", urls[2*i+1],
			"--initial-cluster", strings.Join(peers, ","), "--initial-cluster-state", "new",
			"--heartbeat-interval", "50", "--election-timeout", "500",
			"--unsafe-no-fsync", "--log-level", "error", "--logger", "zap"}
		m.start()
	}
	c.healthy()
	return c
}

// freeURLs are on addresses of their own in 127/8, at a port that no outgoing
// connection gets: a member that comes back must find it free.
func freeURLs(t testing.TB, n int) []string {
	t.Helper()
	var urls []string
	for len(urls) < n {
		addr := fmt.Sprintf("127.%d.%d.%d:2379", 100+rand.N(100), rand.N(256), 1+rand.N(254))
		if l, err := net.Listen("tcp", addr); err == nil {
			_ = l.Close()
			urls = append(urls, "http://"+addr)
		}
	}
	return urls
}

// start runs the member, with the data that it has.
func (m *server) start() {
	m.t.Helper()
	m.cmd = exec.Command(m.args[0], m.args[1:]...)
	m.cmd.Stderr = os.Stderr
	m.cmd.Env = append(os.Environ(), "ETCD_UNSUPPORTED_ARCH="+runtime.GOARCH) // Debian has etcd for arm64 too
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(m.kill)
}

func (m *server) kill() {
	if m.cmd.ProcessState == nil {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
	}
}

func (m *server) signal(sig syscall.Signal) {
	m.t.Helper()
	if err := m.cmd.Process.Signal(sig); err != nil {
		m.t.Fatal(err)
	}
}

func (c cluster) urls() []string {
	var urls []string
	for _, m := range c {
		urls = append(urls, m.url)
	}
	return urls
}

// client is one that is not a Store's.
func (c cluster) client() *clientv3.Client {
	t := c[0].t
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: c.urls(), Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// healthy waits until the cluster has a leader.
func (c cluster) healthy() {
	t := c[0].t
	t.Helper()
	client := c.client()
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	for {
		try, done := context.WithTimeout(ctx, time.Second)
		_, err := client.Get(try, "x")
		done()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("etcd does not come up: %v", err)
		}
		pause(ctx, 20*time.Millisecond)
	}
}

var prefixes atomic.Int64

func newPrefix() string { return fmt.Sprint("/test/", prefixes.Add(1)) }

// openStore opens one more store, as another process would, on the machine
// that has path as its state directory.
func openStore(t testing.TB, path string, opt Options) *Store {
	t.Helper()
	dir, err := statedir.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	opt.Dir = dir
	s, err := Open(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := dir.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func bump(s *routing.State) error { s.Switches++; return nil }

func update(t testing.TB, s *Store, change func(*routing.State) error) *routing.State {
	t.Helper()
	state, err := s.Update(within(t, patient), change)
	if err != nil {
		t.Fatalf("Update: %v", err)
	}
	return state
}

func load(t testing.TB, s *Store) *routing.State {
	t.Helper()
	state, err := s.Load(within(t, patient))
	if err != nil {
		t.Fatalf("Load: %v", err)
	}
	return state
}

func joinAs(t testing.TB, s *Store, id string) {
	t.Helper()
	if err := s.Join(within(t, patient), id); err != nil {
		t.Fatalf("Join(%s): %v", id, err)
	}
}

// until reads a watch until it sends what is awaited.
func until(t testing.TB, w <-chan *routing.State, what string, is func(*routing.State) bool) *routing.State {
	t.Helper()
	for deadline := time.After(patient); ; {
		select {
		case s, ok := <-w:
			if !ok {
				t.Fatal("the watch has ended")
			}
			if is(s) {
				return s
			}
		case <-deadline:
			t.Fatalf("the watch did not send %s", what)
		}
	}
}

func switches(n uint64) func(*routing.State) bool {
	return func(s *routing.State) bool { return s.Switches == n }
}

// eventually asks again and again until is says yes.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	ctx := within(t, patient)
	for !is() {
		if ctx.Err() != nil {
			t.Fatalf("it never came that %s", what)
		}
		pause(ctx, 20*time.Millisecond)
	}
}
