package integration

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"testing"
	"time"
)

// syslogReceiver is the /dev/log of the servers we start.
//
// They see it by a bind mount in a mount namespace of their own, so that a
// syslogd of the machine is neither needed nor disturbed. Where namespaces are
// forbidden and there is no /dev/log, the socket is made there directly.
type syslogReceiver struct {
	conn   *net.UnixConn
	socket string
	direct bool     // the socket is /dev/log itself
	mount  *os.File // placeholder at /dev/log that we may have made; nil if direct

	mu   sync.Mutex
	logs map[string][]logLine // by syslog_prefix
}

// logLine is one datagram and when it came.
type logLine struct {
	at      time.Time
	process string // "imap", "pop3", "sync_client", …
	pid     string
	text    string
}

const devLog = "/dev/log"

func listenSyslog(dir string) (*syslogReceiver, error) {
	r := &syslogReceiver{socket: filepath.Join(dir, "log"), logs: map[string][]logLine{}}
	if exec.Command("unshare", "-m", "true").Run() == nil {
		if err := r.placeholder(); err != nil {
			return nil, err
		}
	} else {
		if _, err := os.Lstat(devLog); err == nil {
			return nil, errors.New("/dev/log exists and unshare -m is forbidden: Cyrus's log cannot be read here")
		}
		r.socket, r.direct = devLog, true
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: r.socket, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	if err = os.Chmod(r.socket, 0o666); err != nil {
		return nil, err
	}
	conn.SetReadBuffer(4 << 20)
	r.conn = conn
	go r.receive()
	return r, nil
}

// placeholder makes a file to mount over where there is no /dev/log. Every run
// that uses it holds a shared lock; the last one removes it.
func (r *syslogReceiver) placeholder() error {
	f, err := os.OpenFile(devLog, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o666)
	if errors.Is(err, fs.ErrExist) {
		if info, statErr := os.Stat(devLog); statErr != nil || !info.Mode().IsRegular() {
			return statErr // a real syslogd's socket: nothing of ours
		}
		f, err = os.Open(devLog)
	}
	if err != nil {
		return err
	}
	r.mount = f
	return syscall.Flock(int(f.Fd()), syscall.LOCK_SH)
}

// command wraps argv so that its /dev/log is ours.
func (r *syslogReceiver) command(argv ...string) []string {
	if r.direct {
		return argv
	}
	const script = `mount --bind "$1" /dev/log && shift && exec "$@"`
	return append([]string{"unshare", "-m", "sh", "-c", script, "sh", r.socket}, argv...)
}

// "<22>Nov 23 20:54:34 prefix/imap[123]: text"
var datagram = regexp.MustCompile(`^<\d+>\w{3} [ \d]\d \d\d:\d\d:\d\d ([^/\[: ]+)/([^\[: ]+)(?:\[(\d+)\])?: ?(?s:(.*?))\s*$`)

func (r *syslogReceiver) receive() {
	raw := make([]byte, 64<<10)
	for {
		n, err := r.conn.Read(raw)
		if err != nil {
			return
		}
		now := time.Now()
		if m := datagram.FindSubmatch(raw[:n]); m != nil {
			prefix := string(m[1])
			line := logLine{now, string(m[2]), string(m[3]), string(m[4])}
			r.mu.Lock()
			r.logs[prefix] = append(r.logs[prefix], line)
			r.mu.Unlock()
		}
	}
}

// of returns the log of one instance so far.
func (r *syslogReceiver) of(prefix string) []logLine {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]logLine(nil), r.logs[prefix]...)
}

// settle waits until every datagram sent so far has been read: it sends one
// itself and waits for it.
func (r *syslogReceiver) settle(t testing.TB, prefix string) {
	t.Helper()
	mark := "settled " + time.Now().String()
	conn, err := net.Dial("unixgram", r.socket)
	must(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("<22>Jan  1 00:00:00 " + prefix + "/test[1]: " + mark))
	must(t, err)
	within(t, 5*time.Second, "the syslog receiver catches up", func() bool {
		for _, l := range r.of(prefix) {
			if l.text == mark {
				return true
			}
		}
		return false
	})
}

func (r *syslogReceiver) close() {
	r.conn.Close()
	if r.direct {
		os.Remove(devLog)
	}
	if r.mount != nil && syscall.Flock(int(r.mount.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
		os.Remove(devLog)
	}
}
