package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	cyrusBin = "/usr/lib/cyrus/bin/"
	password = "secret" // everybody's, on every server
)

// cyrus is one Cyrus instance: master, services and what it forks.
type cyrus struct {
	*daemon
	prefix  string // of its syslog lines; also its host name: be1 is be1.test
	host    string
	conf    string // imapd.conf
	primary bool   // has an LMTP service; a replica must not (lmtpd ignores readonly)
}

// cyrusPair is a primary and its replica. Both take logins and writes: Cyrus's
// `readonly` is not set on b, so nothing but posthouse keeps users off b before
// the switch, and off a after it. A frontend that errs is seen in b's log
// instead of being saved by the backend.
type cyrusPair struct{ a, b *cyrus }

// cyrusSerial makes the syslog prefixes of a run distinct.
var cyrusSerial = struct {
	sync.Mutex
	n int
}{}

// newCyrusPair starts both, creates INBOXes for users on a, starts rolling
// replication and waits until b has all of them.
func newCyrusPair(t testing.TB, users ...string) *cyrusPair {
	t.Helper()
	ahost, bhost := nextHost(), nextHost()
	p := &cyrusPair{a: newCyrus(t, ahost, bhost), b: newCyrus(t, bhost, ahost)}
	p.a.primary = true
	p.a.start(t)
	p.b.start(t)
	p.a.createUsers(t, users...)
	p.a.startSync(t)
	p.waitReplicated(t, users...)
	return p
}

// newCyrus lays an instance out without starting it. peer is the host it
// replicates to, once it is told to.
func newCyrus(t testing.TB, host, peer string) *cyrus {
	t.Helper()
	cyrusSerial.Lock()
	cyrusSerial.n++
	prefix := fmt.Sprintf("be%d", cyrusSerial.n)
	cyrusSerial.Unlock()
	dir := newDir(t, prefix+"-")
	for _, sub := range []string{"spool", "sieve", "socket", "tmp", "conf/db", "conf/socket", "conf/sync", "conf/log",
		"conf/proc", "conf/lock", "conf/user", "conf/quota", "conf/msg"} {
		must(t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
	}
	lab.ca.issue(t, dir, prefix+".test", host)
	c := &cyrus{daemon: &daemon{name: prefix, dir: dir}, prefix: prefix, host: host, conf: filepath.Join(dir, "imapd.conf")}
	expand := strings.NewReplacer("$D", dir, "$HOST", host, "$PEER", peer, "$NAME", prefix)
	writeFile(t, c.conf, expand.Replace(imapdConf))
	sasldb, err := os.ReadFile(passwords(t))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "sasldb2"), sasldb, 0o600))
	must(t, exec.Command("chown", "-R", "cyrus:mail", dir).Run())
	return c
}

// servername is the SASL realm too: the same on all instances, so one sasldb
// serves all. Without duplicatesuppression a message that is delivered twice is
// there twice: a test must see that.
const imapdConf = `
servername: cyrus.test
configdirectory: $D/conf
defaultpartition: default
partition-default: $D/spool
sievedir: $D/sieve
temp_path: $D/tmp
lmtpsocket: $D/socket/lmtp
idlesocket: $D/socket/idle
syslog_prefix: $NAME
auditlog: yes
admins: cyrus repl
proxyservers: proxy
unixhierarchysep: yes
altnamespace: yes
virtdomains: off
allowplaintext: yes
sasl_pwcheck_method: auxprop
sasl_auxprop_plugin: sasldb
sasl_sasldb_path: $D/sasldb2
sasl_mech_list: PLAIN LOGIN
tls_server_cert: $D/cert.pem
tls_server_key: $D/key.pem
tls_versions: tls1_2 tls1_3
sieve_allowreferrals: 0
lmtp_downcase_rcpt: yes
duplicatesuppression: no
failedloginpause: 0s
sync_log: 1
sync_host: $PEER
sync_port: 2005
sync_try_imap: no
sync_authname: repl
sync_password: secret
sync_repeat_interval: 1
sync_reconnect_maxwait: 5
`

const lmtpService = `lmtp  cmd="lmtpd -C $D/imapd.conf -a" listen="$HOST:24" prefork=0`

const cyrusConf = `
START {
  recover cmd="ctl_cyrusdb -C $D/imapd.conf -r"
}
SERVICES {
  imap  cmd="imapd -C $D/imapd.conf -U 100" listen="$HOST:143" prefork=1
  imaps cmd="imapd -C $D/imapd.conf -s" listen="$HOST:993" prefork=0
  pop3  cmd="pop3d -C $D/imapd.conf" listen="$HOST:110" prefork=0
  pop3s cmd="pop3d -C $D/imapd.conf -s" listen="$HOST:995" prefork=0
  sieve cmd="timsieved -C $D/imapd.conf" listen="$HOST:4190" prefork=0
  csync cmd="sync_server -C $D/imapd.conf" listen="$HOST:2005" prefork=0
  $LMTP
}
DAEMON {
  idled cmd="idled -C $D/imapd.conf"
}
`

// passwords makes, once, a sasldb with u0001 … u0060, proxy, repl and cyrus.
func passwords(t testing.TB) string {
	t.Helper()
	passwordsOnce.Do(func() {
		path := filepath.Join(lab.dir, "sasldb2")
		for _, user := range append(userNames(60), "cyrus", "proxy", "repl") {
			cmd := exec.Command("saslpasswd2", "-p", "-c", "-f", path, "-u", "cyrus.test", user)
			cmd.Stdin = strings.NewReader(password)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("saslpasswd2: %v: %s", err, out)
			}
		}
	})
	return filepath.Join(lab.dir, "sasldb2")
}

var passwordsOnce sync.Once

// userNames returns u0001 … in number n.
func userNames(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("u%04d", i+1)
	}
	return names
}

// service is the instance as clients reach it directly.
func (c *cyrus) service() service {
	return service{name: c.certName(), at: map[string]string{
		"imap/starttls": c.host + ":143", "imap/implicit": c.host + ":993",
		"pop3/starttls": c.host + ":110", "pop3/implicit": c.host + ":995",
		"sieve/starttls": c.host + ":4190",
	}}
}

func (c *cyrus) imap() string     { return c.host + ":143" }
func (c *cyrus) lmtp() string     { return c.host + ":24" }
func (c *cyrus) certName() string { return c.prefix + ".test" }

// start runs master in the foreground and stops it at the end of the test. It
// is the cyrus user from the beginning, with the one capability that binds the
// standard ports: started by root it would give that up, and could not open the
// LMTP service later.
func (c *cyrus) start(t testing.TB) {
	t.Helper()
	c.writeServices(t)
	argv := lab.syslog.command("setpriv", "--reuid=cyrus", "--regid=mail", "--init-groups",
		"--inh-caps=+net_bind_service", "--ambient-caps=+net_bind_service", cyrusBin+"master", "-D", "-C", c.conf, "-M", filepath.Join(c.dir, "cyrus.conf"),
		"-p", filepath.Join(c.dir, "master.pid"))
	c.daemon = startDaemon(t, c.prefix, c.dir, argv...)
	c.hangsAlone = true // master 3.6 does, where TERM comes within its first moments
	t.Cleanup(func() { c.stop(t) })
	c.listening(t, c.imap())
	c.listening(t, c.host+":2005")
	if c.primary {
		c.listening(t, c.lmtp())
	}
}

// writeServices writes cyrus.conf for the instance's part in the pair.
func (c *cyrus) writeServices(t testing.TB) {
	t.Helper()
	lmtp := ""
	if c.primary {
		lmtp = lmtpService
	}
	expand := strings.NewReplacer("$D", c.dir, "$HOST", c.host)
	writeFile(t, filepath.Join(c.dir, "cyrus.conf"), expand.Replace(strings.ReplaceAll(cyrusConf, "$LMTP", lmtp)))
}

// change makes b the primary and a its replica, as an operator does in an
// orderly change: a takes no mail any more, b gets what it lacks, b takes mail
// and replicates to a. It may be called again for the way back: a is then the
// new primary.
func (p *cyrusPair) change(t testing.TB) {
	t.Helper()
	old, next := p.a, p.b
	if next.primary {
		old, next = next, old
	}
	old.setPrimary(t, false)
	old.stopSync(t)
	old.flush(t)
	next.setPrimary(t, true)
	next.startSync(t)
}

// setPrimary opens or closes the LMTP service, without touching the others.
func (c *cyrus) setPrimary(t testing.TB, primary bool) {
	t.Helper()
	c.primary = primary
	c.writeServices(t)
	must(t, c.cmd.Process.Signal(syscall.SIGHUP))
	within(t, 5*time.Second, fmt.Sprintf("%s listens for LMTP: %t", c.prefix, primary), func() bool { return accepts(c.lmtp()) == primary })
}

// stop ends the instance and its sync_client, and waits until all are gone.
func (c *cyrus) stop(t testing.TB) {
	t.Helper()
	c.signalSync("TERM")
	c.daemon.stop(t, 10*time.Second)
}

// argv is a Cyrus program run as the cyrus user.
func (c *cyrus) argv(program string, args ...string) []string {
	argv := []string{"setpriv", "--reuid=cyrus", "--regid=mail", "--init-groups", cyrusBin + program, "-C", c.conf}
	return lab.syslog.command(append(argv, args...)...)
}

// startSync starts rolling replication to the peer; sync_client forks away.
func (c *cyrus) startSync(t testing.TB) {
	t.Helper()
	argv := c.argv("sync_client", "-r", "-l")
	if err := exec.Command(argv[0], argv[1:]...).Run(); err != nil {
		t.Fatalf("sync_client -r: %v", err)
	}
}

// stopSync ends rolling replication; what it had not finished stays in the
// sync log.
func (c *cyrus) stopSync(t testing.TB) {
	t.Helper()
	c.signalSync("TERM")
	within(t, 10*time.Second, "sync_client ends", func() bool { return len(c.syncClients()) == 0 })
}

func (c *cyrus) syncClients() []process {
	var found []process
	for _, p := range c.family() {
		if strings.Contains(p.command, "sync_client") {
			found = append(found, p)
		}
	}
	return found
}

func (c *cyrus) signalSync(signal string) {
	for _, p := range c.syncClients() {
		exec.Command("kill", "-"+signal, strconv.Itoa(p.pid)).Run()
	}
}

// flush sends the peer everything that rolling replication has not: the
// operator's catch-up.
func (c *cyrus) flush(t testing.TB) {
	t.Helper()
	if out, err := runTool(t, 60*time.Second, nil, c.argv("sync_client", "-o", "-A")...); err != nil {
		t.Fatalf("sync_client -A: %v: %s", err, out)
	}
}

// admin opens a connection of the administrator.
func (c *cyrus) admin(t testing.TB) *wire {
	t.Helper()
	w, err := imapLogin(c.imap(), c.certName(), "cyrus", password, 5*time.Second)
	must(t, err)
	return w.keep(t)
}

// as opens a connection of a user directly to this instance, in test code only:
// what is looked at this way shows up in the instance's log as well.
func (c *cyrus) as(t testing.TB, user string) *wire {
	t.Helper()
	w, err := imapLogin(c.imap(), c.certName(), user, password, 5*time.Second)
	must(t, err)
	return w.keep(t)
}

func (c *cyrus) createUsers(t testing.TB, users ...string) {
	t.Helper()
	w := c.admin(t)
	for _, user := range users {
		_, _, err := w.imap(5*time.Second, "CREATE user/%s", user)
		must(t, err)
	}
	w.imap(5*time.Second, "LOGOUT")
}

// waitReplicated waits until b has an INBOX for each user.
func (p *cyrusPair) waitReplicated(t testing.TB, users ...string) {
	t.Helper()
	w := p.b.admin(t)
	within(t, 20*time.Second, "every mailbox is on the replica", func() bool {
		untagged, _, err := w.imap(5*time.Second, `LIST "" user/%%`)
		must(t, err)
		return len(untagged) >= len(users)
	})
	w.imap(5*time.Second, "LOGOUT")
}

// mailDir is where the messages of all users lie.
func (c *cyrus) mailDir() string { return filepath.Join(c.dir, "spool") }

// deliver puts a message into a user's INBOX.
func (c *cyrus) deliver(t testing.TB, user, subject string) {
	t.Helper()
	w := c.as(t, user)
	must(t, w.append(5*time.Second, "INBOX", subject))
	w.imap(5*time.Second, "LOGOUT")
	w.Close()
}
