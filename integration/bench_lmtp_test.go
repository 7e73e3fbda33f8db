//go:build bench

package integration

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var (
	benchRounds = flag.Int("rounds", 9, "measured rounds for each load, after one to warm up")
	benchSlice  = flag.Duration("slice", 1500*time.Millisecond, "how long each contender has the load in a round")
)

// benchConnections is how many connections an MTA keeps to its LMTP target at
// a time: between Postfix's two for a destination at the start and its twenty.
const benchConnections = 8

// benchLoads are the kinds of mail: ordinary, for a small list, with a picture.
var benchLoads = []benchLoad{
	{"4 KB, 1 recipient", 4 << 10, 1},
	{"4 KB, 5 recipients", 4 << 10, 5},
	{"100 KB, 1 recipient", 100 << 10, 1},
}

// benchDovecots are Dovecot's LMTP proxy as it is shipped, and what might be
// cheaper. The best of them is what posthouse is compared with.
var benchDovecots = []struct{ name, service string }{
	{"Dovecot, as shipped", ""},
	{"Dovecot, processes kept ready", fmt.Sprintf("process_min_avail = %d", benchConnections)},
	{"Dovecot, connections share processes", "client_limit = 100\n  process_limit = 2\n  process_min_avail = 2"},
}

// TestBenchLMTP sends the same mail straight to a backend, through posthouse
// and through Dovecot's LMTP proxy, in turn, and prints what each of the two
// costs. One backend is a real Dovecot, whose own work is most of it; the other
// takes the messages and forgets them, so that the proxies' share shows.
//
// CPU is that of all processes of a contender, by a control group: exact, and
// processes that have ended are in it. Memory is the proportional set size of
// all its processes, sampled in a round of its own, because looking costs, too.
func TestBenchLMTP(t *testing.T) {
	var fs syscall.Statfs_t
	must(t, syscall.Statfs(lab.dir, &fs))
	if fs.Type != 0x01021994 { // TMPFS_MAGIC, linux/magic.h
		t.Fatalf("%s is no tmpfs: a disk would be measured; set TMPDIR, as make bench does", lab.dir)
	}
	t.Run("dovecot", func(t *testing.T) {
		d := newDovecot(t)
		benchBackend(t, "a real Dovecot, which stores them in maildirs in memory", d.host, func(sent int) {
			stored, err := filepath.Glob(filepath.Join(d.mailDir(), "*", "Maildir", "new", "*"))
			must(t, err)
			if len(stored) != sent {
				t.Errorf("%d messages were accepted, the backend has %d", sent, len(stored))
			}
			for _, user := range benchUsers {
				must(t, os.RemoveAll(filepath.Join(d.mailDir(), user)))
			}
		})
	})
	t.Run("sink", func(t *testing.T) {
		benchBackend(t, "a server that forgets them at once", startSink(t), func(int) {})
	})
}

var benchUsers = userNames(100)

// contender is one way to the backend.
type contender struct {
	name    string
	address string
	daemon  *daemon // nil: there is nothing between
	group   *cgroup
	peak    int64 // PSS, in octets
	slices  map[string][]benchSample
}

// benchSample is what one contender did in one round.
type benchSample struct {
	rate    float64 // messages in a second
	cpu     float64 // of the proxy, in microseconds for each message
	latency float64 // median, from MAIL to the last reply, in milliseconds
}

// benchBackend runs all loads against all contenders before one backend. After
// every slice emptied is told how many messages the backend must have by then.
func benchBackend(t *testing.T, what, host string, emptied func(sent int)) {
	all := []*contender{{name: "straight to the backend", address: host + ":24"}, benchPosthouse(t, host)}
	for _, d := range benchDovecots {
		all = append(all, benchDovecot(t, d.name, d.service, host))
	}
	for _, c := range all {
		c.slices = map[string][]benchSample{}
	}
	for _, l := range benchLoads {
		message := l.message()
		run := func(c *contender) benchSample {
			s, sent := c.measure(t, l, message)
			emptied(sent * l.rcpts)
			return s
		}
		for round := range 1 + *benchRounds {
			for i := range all {
				c := all[(i+round)%len(all)] // nobody always comes after the same
				if s := run(c); round > 0 {
					c.slices[l.name] = append(c.slices[l.name], s)
				}
			}
		}
		for _, c := range all[1:] {
			stop := c.watchMemory()
			run(c)
			stop()
		}
	}
	t.Logf("Messages for %s\n%s", what, benchTable(all))
}

// measure gives a contender the load for one slice. Work that is left after
// the last reply, such as writing logs, is the contender's, too.
func (c *contender) measure(t *testing.T, l benchLoad, message []byte) (benchSample, int) {
	t.Helper()
	before := c.group.cpu(t)
	began := time.Now()
	took, err := l.send(c.address, message, began.Add(*benchSlice))
	elapsed := time.Since(began)
	if err != nil {
		t.Fatalf("%s, %s: %v", c.name, l.name, err)
	}
	<-time.After(100 * time.Millisecond)
	cpu := c.group.cpu(t) - before
	slices.Sort(took)
	n := float64(len(took))
	return benchSample{
		rate:    n / elapsed.Seconds(),
		cpu:     float64(cpu.Microseconds()) / n,
		latency: float64(took[len(took)/2].Microseconds()) / 1000,
	}, len(took)
}

// watchMemory looks at the contender's memory until stop is called.
func (c *contender) watchMemory() (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			c.peak = max(c.peak, c.group.pss())
			select {
			case <-tick.C:
			case <-quit:
				return
			}
		}
	}()
	return func() { close(quit); <-done }
}

// benchTable writes the results in Markdown: medians with the least and the
// most of all rounds.
func benchTable(all []*contender) string {
	var b strings.Builder
	b.WriteString("| load | way | messages/s | median latency, ms | CPU of the proxy, µs/message | CPU, posthouse = 1 |\n|---|---|---|---|---|---|\n")
	for _, l := range benchLoads {
		own := spreadOf(all[1].slices[l.name], func(s benchSample) float64 { return s.cpu }).median
		for _, c := range all {
			s := c.slices[l.name]
			cpu, ratio := "—", "—"
			if c.daemon != nil {
				used := spreadOf(s, func(s benchSample) float64 { return s.cpu })
				cpu, ratio = used.String(), fmt.Sprintf("%.2f", used.median/own)
			}
			fmt.Fprintf(&b, "| %s | %s | %v | %.2f | %s | %s |\n", l.name, c.name,
				spreadOf(s, func(s benchSample) float64 { return s.rate }),
				spreadOf(s, func(s benchSample) float64 { return s.latency }).median, cpu, ratio)
		}
	}
	b.WriteString("\n| way | peak memory, MB |\n|---|---|\n")
	for _, c := range all[1:] {
		fmt.Fprintf(&b, "| %s | %.1f |\n", c.name, float64(c.peak)/1e6)
	}
	return b.String()
}

type spread struct{ median, least, most float64 }

func spreadOf(samples []benchSample, of func(benchSample) float64) spread {
	var all []float64
	for _, s := range samples {
		all = append(all, of(s))
	}
	slices.Sort(all)
	return spread{(all[(len(all)-1)/2] + all[len(all)/2]) / 2, all[0], all[len(all)-1]}
}

func (s spread) String() string { return fmt.Sprintf("%.0f (%.0f–%.0f)", s.median, s.least, s.most) }

// benchPosthouse starts posthouse with nothing but an LMTP listener.
func benchPosthouse(t *testing.T, backend string) *contender {
	dir, host := newDir(t, "bench-"), nextHost()
	var users strings.Builder
	for _, user := range benchUsers {
		fmt.Fprintf(&users, "%s: ma01\n", user)
	}
	writeFile(t, filepath.Join(dir, "users.map"), users.String())
	must(t, os.Mkdir(filepath.Join(dir, "state"), 0o700))
	writeFile(t, filepath.Join(dir, "posthouse.yaml"), strings.NewReplacer("$D", dir, "$HOST", host, "$BACKEND", backend).Replace(`
hostname: posthouse.test
state_dir: $D/state
store: {type: file}
listeners:
  - {protocol: lmtp, address: "$HOST:24", tls: off, trusted: ["127.0.0.0/8"]}
directory:
  - {type: file, path: $D/users.map}
backends:
  a: {lmtp: "$BACKEND:24", tls: {mode: off}}
roles:
  ma01: {members: [a], active: a}
lmtp: {local_domains: ["*"]}
admin: {socket: $D/admin.sock}
log: {level: info, format: json}
`))
	return startContender(t, "posthouse", dir, host, builtPosthouse(t, true), "serve", "-c", filepath.Join(dir, "posthouse.yaml"))
}

// benchDovecot starts Dovecot as an LMTP proxy. service is what its lmtp
// service has beyond what is shipped.
func benchDovecot(t *testing.T, name, service, backend string) *contender {
	dir, host := newDir(t, "bench-"), nextHost()
	writeFile(t, filepath.Join(dir, "dovecot.conf"),
		strings.NewReplacer("$D", dir, "$HOST", host, "$BACKEND", backend, "$SERVICE", service).Replace(`
base_dir = $D/run
state_dir = $D/state
log_path = $D/log
listen = $HOST
protocols = lmtp
default_login_user = nobody
default_internal_user = daemon
default_internal_group = daemon
ssl = no
login_trusted_networks = 127.0.0.0/8
lmtp_proxy = yes
auth_username_format = %Ln
passdb {
  driver = static
  args = nopassword=y proxy=y host=$BACKEND port=24
}
service lmtp {
  $SERVICE
  inet_listener lmtp {
    port = 24
  }
}
`))
	return startContender(t, name, dir, host, dovecotProgram(t), "-F", "-c", filepath.Join(dir, "dovecot.conf"))
}

// startContender starts a proxy that logs to a file, and gives it a control
// group of its own.
func startContender(t *testing.T, name, dir, host string, argv ...string) *contender {
	t.Helper()
	d := startDaemon(t, name, dir, append([]string{"sh", "-c", `exec "$@" 2>` + dir + "/stderr", "sh"}, argv...)...)
	t.Cleanup(func() { d.stop(t, 10*time.Second) })
	d.listening(t, host+":24")
	return &contender{name: name, address: host + ":24", daemon: d, group: newCgroup(t, d)}
}
