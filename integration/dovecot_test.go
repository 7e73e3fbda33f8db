package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// dovecot is one Dovecot instance. Any user may log in with the password;
// `proxy` is a master user. A recipient is the user of that local part, in any
// domain, as on the lab's Cyrus.
type dovecot struct {
	*daemon
	host string
	cert string // its name there
}

var dovecotSerial atomic.Int32

// newDovecot starts an instance with no mail. more is added to its configuration.
func newDovecot(t testing.TB, more ...string) *dovecot {
	t.Helper()
	name := fmt.Sprintf("dc%d", dovecotSerial.Add(1))
	d := &dovecot{host: nextHost(), cert: name + ".test"}
	dir := newDir(t, name+"-")
	mail := filepath.Join(dir, "mail")
	must(t, os.MkdirAll(mail, 0o755))
	must(t, exec.Command("chown", "nobody:nogroup", mail).Run())
	lab.ca.issue(t, dir, d.cert, d.host)
	writeFile(t, filepath.Join(dir, "master-users"), "proxy:{PLAIN}"+password+"\n")
	expand := strings.NewReplacer("$D", dir, "$HOST", d.host, "$MAIL", mail)
	config := filepath.Join(dir, "dovecot.conf")
	writeFile(t, config, expand.Replace(dovecotConf+strings.Join(more, "\n")))

	d.daemon = startDaemon(t, name, dir, dovecotProgram(t), "-F", "-c", config)
	t.Cleanup(func() { d.stop(t, 10*time.Second) })
	d.listening(t, d.imap())
	d.listening(t, d.host+":4190")
	d.listening(t, d.lmtp())
	return d
}

// dovecotProgram finds the binary beside the library directory that is
// compiled in: /usr/lib/dovecot is a symlink into the unpacked packages.
func dovecotProgram(t testing.TB) string {
	t.Helper()
	lib, err := filepath.EvalSymlinks("/usr/lib/dovecot")
	must(t, err)
	program := filepath.Join(lib, "..", "..", "sbin", "dovecot")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v; install it with: make deps", err)
	}
	return program
}

// service is the instance as clients reach it directly.
func (d *dovecot) service() service {
	return service{name: d.cert, quotesChallenges: true, at: map[string]string{
		"imap/starttls": d.host + ":143", "imap/implicit": d.host + ":993",
		"pop3/starttls": d.host + ":110", "pop3/implicit": d.host + ":995",
		"sieve/starttls": d.host + ":4190",
	}}
}

func (d *dovecot) imap() string { return d.host + ":143" }
func (d *dovecot) lmtp() string { return d.host + ":24" }

// logText is its log so far.
func (d *dovecot) logText() string {
	raw, _ := os.ReadFile(filepath.Join(d.dir, "log"))
	return string(raw)
}

// as opens a connection of a user directly to this instance.
func (d *dovecot) as(t testing.TB, user string) *wire {
	t.Helper()
	w, err := imapLogin(d.imap(), d.cert, user, password, 5*time.Second)
	must(t, err)
	return w.keep(t)
}

const dovecotConf = `
base_dir = $D/run
state_dir = $D/state
log_path = $D/log
listen = $HOST
protocols = imap pop3 sieve lmtp
default_login_user = nobody
default_internal_user = daemon
default_internal_group = daemon
first_valid_uid = 1
ssl = yes
ssl_cert = <$D/cert.pem
ssl_key = <$D/key.pem
disable_plaintext_auth = no
auth_mechanisms = plain login
auth_username_format = %Ln
auth_master_user_separator = *
mail_max_userip_connections = 0
auth_failure_delay = 0
login_trusted_networks = 127.0.0.0/8
passdb {
  driver = passwd-file
  args = $D/master-users
  master = yes
  result_success = continue
}
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=nobody gid=nogroup home=$MAIL/%u allow_all_users=yes
}
mail_location = maildir:~/Maildir
service anvil {
  unix_listener anvil-auth-penalty {
    mode = 0
  }
}
service lmtp {
  inet_listener lmtp {
    port = 24
  }
}
service imap-login {
  inet_listener imap {
    port = 143
  }
  inet_listener imaps {
    port = 993
    ssl = yes
  }
}
`

// mailDir is where the messages of all users lie.
func (d *dovecot) mailDir() string { return filepath.Join(d.dir, "mail") }

// deliver puts a message into a user's INBOX.
func (d *dovecot) deliver(t testing.TB, user, subject string) {
	t.Helper()
	w := d.as(t, user)
	must(t, w.append(5*time.Second, "INBOX", subject))
	w.imap(5*time.Second, "LOGOUT")
	w.Close()
}
