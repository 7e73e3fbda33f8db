package integration

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// lan is a network between the tests' own namespace, where the backends, etcd and
// the clients are, and namespaces with one frontend each, as if it had a machine
// of its own. What is cut is cut inside a namespace: nothing that others on this
// machine use is touched.
type lan struct {
	bridge string // its name, and the prefix of its namespaces' names
	subnet netip.Prefix
	last   netip.Addr // the address that was given away last
	homes  int
}

// home is a namespace, with one address.
type home struct {
	name, host string
}

var lanSerial atomic.Int32

// newLan makes a network whose name no other test and no other run uses. A guard
// removes it and its namespaces with the end of the test, or of this process,
// however that comes about.
func newLan(t testing.TB) *lan {
	t.Helper()
	n := lanSerial.Add(1) - 1
	pid := os.Getpid()
	l := &lan{bridge: fmt.Sprintf("ph%dx%d", pid, n)}
	at := uint32(pid)&0xfff<<12 | uint32(n)&0x3f<<6 // 64 networks of this run
	first := netip.AddrFrom4([4]byte{10, byte(at >> 16), byte(at >> 8), byte(at)}).Next()
	l.subnet, l.last = netip.PrefixFrom(first, 26).Masked(), first

	const guard = `cat >/dev/null
		ip netns list | while read -r name rest; do
			case $name in "$1"-*) ip netns del "$name" ;; esac
		done
		ip link del "$1"`
	cmd := exec.Command("sh", "-c", guard, "guard", l.bridge)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // survives Ctrl-C
	held, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		held.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("removing the network %s: %v", l.bridge, err)
		}
	})
	runs(t, "", "ip", "link", "add", l.bridge, "type", "bridge")
	runs(t, "", "ip", "addr", "add", fmt.Sprintf("%v/%d", first, l.subnet.Bits()), "dev", l.bridge)
	runs(t, "", "ip", "link", "set", l.bridge, "up")
	return l
}

// runs runs a program that must succeed: without namespaces there is no test.
func runs(t testing.TB, stdin string, argv ...string) {
	t.Helper()
	var in io.Reader
	if stdin != "" {
		in = strings.NewReader(stdin)
	}
	if out, err := runTool(t, 20*time.Second, in, argv...); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
}

func (l *lan) next() string {
	l.last = l.last.Next()
	return l.last.String()
}

// server adds an address of the tests' own namespace.
func (l *lan) server(t testing.TB) string {
	t.Helper()
	host := l.next()
	runs(t, "", "ip", "addr", "add", host+"/32", "dev", l.bridge)
	return host
}

func (l *lan) home(t testing.TB) home {
	t.Helper()
	l.homes++
	h := home{fmt.Sprintf("%s-%d", l.bridge, l.homes), l.next()}
	veth := fmt.Sprintf("%sv%d", l.bridge, l.homes)
	runs(t, "", "ip", "netns", "add", h.name)
	runs(t, "", "ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", h.name)
	runs(t, "", "ip", "link", "set", veth, "master", l.bridge, "up")
	runs(t, "", "ip", "-n", h.name, "addr", "add", fmt.Sprintf("%s/%d", h.host, l.subnet.Bits()), "dev", "eth0")
	runs(t, "", "ip", "-n", h.name, "link", "set", "lo", "up")
	runs(t, "", "ip", "-n", h.name, "link", "set", "eth0", "up")
	return h
}

// cut drops, until mend, whatever goes between this home and the hosts: nobody
// is told, as where a cable is pulled.
func (h home) cut(t testing.TB, hosts ...string) {
	t.Helper()
	set := "{ " + strings.Join(hosts, ", ") + " }"
	h.nft(t, "table ip cut {\n"+
		"chain from { type filter hook input priority 0; ip saddr "+set+" drop; }\n"+
		"chain to { type filter hook output priority 0; ip daddr "+set+" drop; }\n}\n")
}

func (h home) mend(t testing.TB) {
	t.Helper()
	h.nft(t, "flush ruleset\n")
}

func (h home) nft(t testing.TB, rules string) {
	t.Helper()
	runs(t, rules, "ip", "netns", "exec", h.name, "nft", "-f", "-")
}

// etcd starts a cluster in the tests' own namespace and ends it with the test.
func (l *lan) etcd(t testing.TB) (e *etcdCluster, hosts []string) {
	t.Helper()
	e = &etcdCluster{dir: newDir(t, "etcd"), members: make([]*daemon, 3)}
	var cluster []string
	for i := range 3 {
		hosts = append(hosts, l.server(t))
		cluster = append(cluster, fmt.Sprintf("e%d=http://%s:2380", i, hosts[i]))
	}
	for i, host := range hosts {
		client, peer := "http://"+host+":2379", "http://"+host+":2380"
		e.urls = append(e.urls, client)
		e.argv = append(e.argv, []string{"etcd", "--name", fmt.Sprint("e", i), "--data-dir", filepath.Join(e.dir, fmt.Sprint("e", i)),
			"--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
			"--initial-advertise-peer-urls", peer, "--initial-cluster-state", "new", "--initial-cluster", strings.Join(cluster, ","),
			"--auto-compaction-retention", "1"})
	}
	e.start(t)
	t.Cleanup(func() { e.stop(t) })
	return e, hosts
}

// resident is a frontend in a home of its own.
type resident struct {
	*posthouse
	home home
}

// frontends starts three frontends of s, each in a home of its own.
func (l *lan) frontends(t testing.TB, s *site) []*resident {
	t.Helper()
	s.write(t)
	var all []*resident
	for range 3 {
		h := l.home(t)
		name := fmt.Sprintf("fe%d", frontendSerial.Add(1))
		dir := newDir(t, name+"-")
		p := &posthouse{site: s, name: name + ".test", host: h.host, conf: filepath.Join(dir, "posthouse.yaml")}
		lab.ca.issue(t, dir, p.name, p.host)
		writeFile(t, p.conf, s.yaml(p, dir))
		r := &resident{p, h}
		r.start(t)
		all = append(all, r)
	}
	for _, r := range all {
		r.ready(t)
	}
	t.Cleanup(func() {
		for _, r := range all {
			if t.Failed() {
				t.Logf("%s's log ends:\n%s", r.name, tail(r.output.String(), 40))
				writeFile(t, filepath.Join(filepath.Dir(r.conf), "log"), r.output.String()) // for KEEP_LAB
			}
			if r.running() {
				r.posthouse.stop(t)
			}
			r.checkRaces(t)
		}
	})
	return all
}

// start starts the process inside its home: its id is the one that is known here.
func (r *resident) start(t testing.TB) {
	t.Helper()
	r.daemon = startDaemon(t, r.name, filepath.Dir(r.conf), "nsenter", "--net=/run/netns/"+r.home.name,
		builtPosthouse(t, r.site.fast), "serve", "-c", r.conf)
}

// takesMailFrom gives the site an LMTP listener for the network's MTAs.
func (s *site) takesMailFrom(l *lan) *site {
	s.doors = append(s.doors, fmt.Sprintf(`{protocol: lmtp, address: "$HOST:24", tls: off, insecure_plaintext: true, trusted: [%q]}`, l.subnet))
	s.more = append(s.more, `lmtp: {local_domains: ["*"]}`)
	return s
}

// distant is a backend that is not on loopback. The permission for plain text
// stands behind done, in the same map.
func distant(b backend) backend {
	b.done += ", insecure_plaintext: true"
	return b
}

// TestPartitionCuts shows that a cut cuts, what is named and nothing else, and
// that a mended line carries again.
func TestPartitionCuts(t *testing.T) {
	t.Parallel()
	l := newLan(t)
	h, near, far := l.home(t), l.server(t), l.server(t)
	for _, host := range []string{near, far} {
		listener, err := net.Listen("tcp", host+":80")
		must(t, err)
		server := &http.Server{}
		t.Cleanup(func() { server.Close() })
		go server.Serve(listener)
	}
	reaches := func(host string) bool {
		_, err := runTool(t, 10*time.Second, nil, "ip", "netns", "exec", h.name, "curl", "-s", "-m", "1", "http://"+host+"/")
		return err == nil
	}
	within(t, 10*time.Second, "the line is up", func() bool { return reaches(near) && reaches(far) })
	h.cut(t, far)
	if reaches(far) {
		t.Error("the cut does not cut")
	}
	if !reaches(near) {
		t.Error("more is cut than was named")
	}
	h.mend(t)
	within(t, 10*time.Second, "the line is mended", func() bool { return reaches(far) })
}
