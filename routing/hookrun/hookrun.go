// Package hookrun runs a site's hooks as commands.
package hookrun

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/routing"
)

const (
	// tempFail is EX_TEMPFAIL of sysexits(3).
	tempFail = 75
	// outputKept is how much of a hook's output goes into the history.
	outputKept = 1024
	// outputLogged is how much of it is logged, in lines of up to longestLine.
	outputLogged = 1 << 20
	longestLine  = 4096
	// killAfter is how long a hook has after SIGTERM.
	killAfter = time.Second
	// usersPrefix begins the names of the lists of users.
	usersPrefix = "users-"
	// listKept is how long a list stays whose driver was killed.
	listKept = time.Hour
)

// Commands are a role's hooks: the program and its arguments, by hook.
type Commands map[routing.Hook][]string

// Runner is a routing.Hooks.
type Runner struct {
	// Roles are the commands of each role.
	Roles map[string]Commands
	// Dir is where the lists of users lie while a hook runs. Frontends may share it.
	Dir string
	// Log gets what hooks write, line by line. Default: none.
	Log *zap.Logger
}

var _ routing.Hooks = (*Runner)(nil)

// Run runs the command that the first role has for the hook: without a shell, in
// a process group of its own, with posthouse's environment and
//
//	POSTHOUSE_ROLE     the role that is switched
//	POSTHOUSE_ROLES    all roles that are switched with it, separated by spaces
//	POSTHOUSE_FROM     the backend that serves it, or did last; empty if nobody knows, and for
//	                   promote in a failover, as nobody can be asked there
//	POSTHOUSE_TO       the backend that shall
//	POSTHOUSE_SWITCH   the number of the switch
//	POSTHOUSE_EPOCH    the epoch of the role; it grows with every switch
//	POSTHOUSE_STEP     demote, prove, catch_up, promote, undo_demote, undo_promote
//	POSTHOUSE_ATTEMPT  which driver of the switch asks: 1, 2, …
//	POSTHOUSE_USERS    a file with the users whose mail may have changed since the last
//	                   switch, one in a line; empty: any user may be one of them
//
// Exit status 75 is routing.ErrTryAgain, any other but 0 an error. When ctx ends,
// the group gets SIGTERM, and SIGKILL a second later. Run returns when the
// command has ended; what it has left in the background is killed.
func (r *Runner) Run(ctx context.Context, call routing.HookCall) (output string, err error) {
	if len(call.Roles) == 0 {
		return "", errors.New("a hook for no role")
	}
	argv := r.Roles[call.Roles[0]][call.Hook]
	if len(argv) == 0 {
		return "", fmt.Errorf("this frontend has no %s hook for role %s in its configuration, and drives the switch", call.Hook, call.Roles[0])
	}
	list, err := r.list(call.Seen)
	if err != nil {
		return "", err
	}
	users := ""
	if list != nil {
		users = list.Name()
		defer list.Close()
		defer os.Remove(users)
	}
	out := outputLog{log: r.Log}
	if r.Log != nil {
		out.log = r.Log.With(zap.String("hook", string(call.Hook)), zap.Uint64("switch", call.Number))
		defer out.flush()
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = append(os.Environ(),
		"POSTHOUSE_ROLE="+call.Roles[0], "POSTHOUSE_ROLES="+strings.Join(call.Roles, " "),
		"POSTHOUSE_FROM="+call.From, "POSTHOUSE_TO="+call.To,
		"POSTHOUSE_SWITCH="+strconv.FormatUint(call.Number, 10), "POSTHOUSE_EPOCH="+strconv.FormatUint(call.Epoch, 10),
		"POSTHOUSE_STEP="+string(call.Hook), "POSTHOUSE_ATTEMPT="+strconv.Itoa(call.Attempt), "POSTHOUSE_USERS="+users)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// A grandchild that holds the output open must not keep the switch waiting.
	cmd.WaitDelay = killAfter
	if err := cmd.Start(); err != nil {
		return "", err
	}
	ended := make(chan struct{})
	var killing sync.WaitGroup
	killing.Go(func() { endGroup(ctx, cmd.Process.Pid, ended) })
	err = cmd.Wait()
	close(ended)
	killing.Wait()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("ended by us: %w", ctx.Err())
	case errors.As(err, &exit) && exit.ExitCode() == tempFail:
		err = fmt.Errorf("%w (exit status %d)", routing.ErrTryAgain, tempFail)
	case errors.Is(err, exec.ErrWaitDelay):
		err = nil // it has ended with 0
	}
	return out.String(), err
}

// list writes a file of users, which stays locked while it is open; nil if it would
// be all of them.
func (r *Runner) list(seen routing.Seen) (*os.File, error) {
	if seen.All {
		return nil, nil
	}
	r.sweep()
	f, err := os.CreateTemp(r.Dir, usersPrefix+"*")
	if err != nil {
		return nil, fmt.Errorf("list of users for a hook: %w", err)
	}
	var text strings.Builder
	for _, user := range seen.Users {
		text.WriteString(user + "\n")
	}
	_, err = f.WriteString(text.String())
	if err = errors.Join(err, syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)); err != nil {
		return nil, errors.Join(fmt.Errorf("list of users for a hook: %w", err), f.Close(), os.Remove(f.Name()))
	}
	return f, nil
}

// sweep removes the lists that killed drivers have left behind. Another frontend's
// list has its lock, or is about to; and a hook whose driver was killed may still
// read its own for as long as a hook runs.
func (r *Runner) sweep() {
	left, _ := os.ReadDir(r.Dir) // what hinders this will hinder making a list
	for _, entry := range left {
		path := filepath.Join(r.Dir, entry.Name())
		if !strings.HasPrefix(entry.Name(), usersPrefix) {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue // another was faster
		}
		info, err := f.Stat()
		if err == nil && time.Since(info.ModTime()) > listKept && syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			_ = os.Remove(path)
		}
		_ = f.Close()
	}
}

// endGroup ends a process group when ctx ends, and what is left of it once its
// leader has ended.
func endGroup(ctx context.Context, pid int, ended <-chan struct{}) {
	select {
	case <-ended:
	case <-ctx.Done():
		_ = syscall.Kill(-pid, syscall.SIGTERM) // fails if it has just ended
		timer := time.NewTimer(killAfter)
		defer timer.Stop()
		select {
		case <-ended:
		case <-timer.C:
		}
	}
	_ = syscall.Kill(-pid, syscall.SIGKILL)
}

// outputLog logs what is written to it, and keeps the end of it.
type outputLog struct {
	log *zap.Logger // may be nil

	mu     sync.Mutex
	kept   []byte
	lost   bool
	line   []byte // not complete yet
	logged int    // octets
}

func (o *outputLog) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.log != nil {
		o.logLines(p)
	}
	o.kept = append(o.kept, p...)
	if n := len(o.kept) - outputKept; n > 0 {
		o.kept, o.lost = append(o.kept[:0], o.kept[n:]...), true
	}
	return len(p), nil
}

func (o *outputLog) logLines(p []byte) {
	for len(p) > 0 && o.logged < outputLogged {
		n := bytes.IndexByte(p, '\n')
		if n < 0 && len(o.line)+len(p) < longestLine {
			o.line = append(o.line, p...)
			return
		}
		if n < 0 || len(o.line)+n > longestLine {
			n = max(longestLine-len(o.line), 0)
		}
		o.line = append(o.line, p[:n]...)
		o.logLine()
		p = p[n:]
		if len(p) > 0 && p[0] == '\n' {
			p = p[1:]
		}
	}
}

func (o *outputLog) logLine() {
	o.logged += len(o.line)
	if text := clean(o.line); text != "" {
		o.log.Info("hook says", zap.String("text", text))
	}
	if o.logged >= outputLogged {
		o.log.Warn("hook says more than is logged", zap.Int("octets", o.logged))
	}
	o.line = o.line[:0]
}

// flush logs a last line without an end.
func (o *outputLog) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.line) > 0 {
		o.logLine()
	}
}

// String is what was kept, fit for a log and for JSON.
func (o *outputLog) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := clean(o.kept)
	if o.lost {
		s = "… " + s
	}
	return s
}

func clean(text []byte) string { return strings.ToValidUTF8(string(bytes.TrimSpace(text)), "\uFFFD") }
