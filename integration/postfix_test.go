package integration

import (
	"encoding/json"
	"fmt"
	"net/smtp"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// postfix is a real Postfix that hands all mail for example.org to one LMTP
// target. It asks no DNS, and what it returns to a sender it throws away.
type postfix struct {
	*daemon
	host string
}

var postfixSerial atomic.Int32

// startPostfix starts one; target is inet:host:port or unix:/path. settings
// are further lines of main.cf.
func startPostfix(t testing.TB, target string, settings ...string) *postfix {
	t.Helper()
	name := fmt.Sprintf("mx%d", postfixSerial.Add(1))
	dir := newDir(t, name+"-")
	p := &postfix{host: nextHost()}
	etc := filepath.Join(dir, "etc")
	must(t, os.Mkdir(etc, 0o755))
	expand := strings.NewReplacer("$D", dir, "$HOST", p.host, "$NAME", name, "$TARGET", target)
	writeFile(t, filepath.Join(etc, "main.cf"), expand.Replace(postfixMain)+strings.Join(settings, "\n")+"\n")
	writeFile(t, filepath.Join(etc, "master.cf"), expand.Replace(postfixMaster))
	writeFile(t, filepath.Join(etc, "dynamicmaps.cf"), "")
	postfixQueue(t, dir)
	// By this name the command line of master, whose end is that of all, shows
	// whose it is.
	sbin := filepath.Join(dir, "sbin")
	must(t, os.Symlink("/usr/lib/postfix/sbin", sbin))

	p.daemon = startDaemon(t, name, dir, filepath.Join(sbin, "master"), "-s", "-c", etc)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s's log ends:\n%s", name, tail(p.logText(), 40))
		}
		p.stop(t, 10*time.Second)
	})
	p.listening(t, p.smtp())
	return p
}

// postfixQueue makes the directories with the owners that Postfix insists on.
func postfixQueue(t testing.TB, dir string) {
	t.Helper()
	mkdir := func(name, owner string, mode os.FileMode) {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(path, 0o755))
		must(t, exec.Command("chown", owner, path).Run())
		must(t, os.Chmod(path, mode))
	}
	mkdir("data", "postfix:root", 0o700)
	mkdir("queue", "root:root", 0o755)
	mkdir("queue/pid", "root:root", 0o755)
	for _, sub := range []string{"active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "saved", "trace"} {
		mkdir("queue/"+sub, "postfix:root", 0o700)
	}
	mkdir("queue/maildrop", "postfix:postdrop", 0o730|os.ModeSticky)
	mkdir("queue/public", "postfix:postdrop", 0o710|os.ModeSetgid)
}

const postfixMain = `
compatibility_level = 3.7
myhostname = $NAME.test
mydomain = test
queue_directory = $D/queue
data_directory = $D/data
daemon_directory = $D/sbin
maillog_file = $D/maillog
maillog_file_prefixes = $D
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_peername_lookup = no
smtpd_relay_restrictions = permit_mynetworks, reject
disable_dns_lookups = yes
smtp_host_lookup = native
mydestination =
alias_maps =
alias_database =
virtual_mailbox_domains = example.org
virtual_transport = lmtp:$TARGET
transport_maps = inline:{ client.test=discard:, $NAME.test=discard: }
notify_classes =
message_size_limit = 300000000
mailbox_size_limit = 0
virtual_mailbox_limit = 0
default_destination_recipient_limit = 100
lmtp_destination_recipient_limit = 100
minimal_backoff_time = 2s
maximal_backoff_time = 4s
queue_run_delay = 2s
`

const postfixMaster = `
$HOST:25   inet  n - n - -  smtpd
pickup     unix  n - n 60 1 pickup
cleanup    unix  n - n - 0  cleanup
qmgr       unix  n - n 300 1 qmgr
tlsmgr     unix  - - n 1000? 1 tlsmgr
rewrite    unix  - - n - -  trivial-rewrite
bounce     unix  - - n - 0  bounce
defer      unix  - - n - 0  bounce
trace      unix  - - n - 0  bounce
verify     unix  - - n - 1  verify
flush      unix  n - n 1000? 0 flush
proxymap   unix  - - n - -  proxymap
proxywrite unix  - - n - 1  proxymap
smtp       unix  - - n - -  smtp
relay      unix  - - n - -  smtp
showq      unix  n - n - -  showq
error      unix  - - n - -  error
retry      unix  - - n - -  error
discard    unix  - - n - -  discard
lmtp       unix  - - n - -  lmtp
anvil      unix  - - n - 1  anvil
scache     unix  - - n - 1  scache
postlog    unix-dgram n - n - 1 postlogd
`

func (p *postfix) smtp() string { return p.host + ":25" }

// send hands a parcel over for all its recipients, in one transaction.
func (p *postfix) send(t testing.TB, m *parcel) {
	t.Helper()
	must(t, smtp.SendMail(p.smtp(), nil, sender, m.rcpts, []byte(m.message())))
}

// queued is one message in the queue.
type queued struct {
	Queue      string `json:"queue_name"` // incoming, active, deferred
	ID         string `json:"queue_id"`
	Recipients []struct {
		Address string `json:"address"`
		Reason  string `json:"delay_reason"`
	} `json:"recipients"`
}

// queue returns what is in the queue, as postqueue shows it.
func (p *postfix) queue(t testing.TB) []queued {
	t.Helper()
	out, err := exec.Command("postqueue", "-c", filepath.Join(p.dir, "etc"), "-j").Output()
	if err != nil {
		t.Fatalf("postqueue: %v", err)
	}
	var all []queued
	for line := range strings.Lines(string(out)) {
		var q queued
		must(t, json.Unmarshal([]byte(line), &q))
		all = append(all, q)
	}
	return all
}

// waitEmpty waits until the queue is empty.
func (p *postfix) waitEmpty(t testing.TB, limit time.Duration) {
	t.Helper()
	if !becomes(limit, func() bool { return len(p.queue(t)) == 0 }) {
		t.Fatalf("%s's queue is not empty after %v: %+v", p.name, limit, p.queue(t))
	}
}

func (p *postfix) logText() string {
	raw, _ := os.ReadFile(filepath.Join(p.dir, "maillog"))
	return string(raw)
}

// handover is one attempt to deliver to one recipient, by the log.
type handover struct {
	agent  string // lmtp, discard, error, …
	id     string // of the queue
	to     string
	status string // sent, deferred, bounced
	said   string // by the target, or about it
}

var handoverLine = regexp.MustCompile(`postfix/(\w+)\[\d+\]: (\w+): to=<([^>]*)>, .*status=(\w+) \((.*)\)$`)

// handovers returns all attempts so far with one of the statuses, in the order
// of the log.
func (p *postfix) handovers(statuses ...string) []handover {
	var all []handover
	for line := range strings.SplitSeq(p.logText(), "\n") {
		if m := handoverLine.FindStringSubmatch(line); m != nil && slices.Contains(statuses, m[4]) {
			all = append(all, handover{m[1], m[2], m[3], m[4], m[5]})
		}
	}
	return all
}

// sent returns what the LMTP target has accepted; bounced what will never be
// delivered.
func (p *postfix) sent() []handover {
	return slices.DeleteFunc(p.handovers("sent"), func(h handover) bool { return h.agent != "lmtp" })
}
func (p *postfix) bounced() []handover  { return p.handovers("bounced", "expired") }
func (p *postfix) deferred() []handover { return p.handovers("deferred") }

// mustNotBounce asserts that nothing was returned to its sender.
func (p *postfix) mustNotBounce(t testing.TB) {
	t.Helper()
	for _, h := range p.bounced() {
		t.Errorf("bounced: %+v", h)
	}
}
