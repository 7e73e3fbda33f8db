package integration

import (
	"bytes"
	"fmt"
	"io"
	"net"
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

// daemon is a server that a test started, in a session of its own.
type daemon struct {
	name   string
	dir    string // stands in the command line of every process that belongs to it
	cmd    *exec.Cmd
	output *buffer
	done   chan struct{} // closed when the started process has been waited for
	// hangsAlone: on TERM it may end its children and then never itself. With
	// no child left stop may kill it.
	hangsAlone bool
}

// startDaemon starts a server. Ending it is the caller's part: stop or kill.
func startDaemon(t testing.TB, name, dir string, argv ...string) *daemon {
	t.Helper()
	d := &daemon{name: name, dir: dir, output: &buffer{}, done: make(chan struct{})}
	d.cmd = exec.Command(argv[0], argv[1:]...)
	d.cmd.Dir = dir
	d.cmd.Stdout, d.cmd.Stderr = d.output, d.output
	d.cmd.WaitDelay = time.Second // children may hold the pipe
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	must(t, d.cmd.Start())
	go func() {
		defer close(d.done)
		d.cmd.Wait()
	}()
	return d
}

// pid is the id of the process that was started, and of its session.
func (d *daemon) pid() int { return d.cmd.Process.Pid }

func (d *daemon) running() bool {
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// family lists every live process of the daemon, children included.
func (d *daemon) family() []process {
	var all []process
	for _, p := range processes() {
		if p.session == d.pid() || strings.Contains(p.command, d.dir+"/") {
			all = append(all, p)
		}
	}
	return all
}

// stop sends TERM and waits until the whole family is gone; after limit it is
// killed and the test fails.
func (d *daemon) stop(t testing.TB, limit time.Duration) {
	t.Helper()
	if d.running() {
		d.cmd.Process.Signal(syscall.SIGTERM)
	}
	if d.hangsAlone && !becomes(time.Second, func() bool { return !d.running() }) && len(d.family()) == 1 {
		d.cmd.Process.Kill()
	}
	if !becomes(limit, func() bool { return !d.running() && len(d.family()) == 0 }) {
		t.Errorf("%s: still there %v after TERM: %v", d.name, limit, d.family())
		d.kill()
	}
}

// kill ends the whole family at once, the started process first.
func (d *daemon) kill() {
	if d.running() {
		d.cmd.Process.Kill()
	}
	becomes(5*time.Second, func() bool {
		family := d.family()
		for _, p := range family {
			syscall.Kill(p.pid, syscall.SIGKILL)
		}
		return len(family) == 0 && !d.running()
	})
}

// listening waits until address accepts connections.
func (d *daemon) listening(t testing.TB, address string) {
	t.Helper()
	if !becomes(10*time.Second, func() bool { return !d.running() || accepts(address) }) || !d.running() {
		t.Fatalf("%s does not listen on %s\n%s", d.name, address, tail(d.output.String(), 20))
	}
}

func accepts(address string) bool {
	c, err := net.DialTimeout("tcp", address, time.Second)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// process is one line of the process table.
type process struct {
	pid, session int
	command      string
}

func (p process) String() string { return fmt.Sprintf("%d %s", p.pid, p.command) }

// processes reads /proc; zombies are left out, since they do nothing any more.
func processes() []process {
	var all []process
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range stats {
		raw, err := os.ReadFile(stat)
		after := bytes.LastIndexByte(raw, ')')
		if err != nil || after < 0 {
			continue
		}
		fields := strings.Fields(string(raw[after+1:])) // state ppid pgrp session …
		if len(fields) < 4 || fields[0] == "Z" {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
		session, _ := strconv.Atoi(fields[3])
		line, _ := os.ReadFile(filepath.Join(filepath.Dir(stat), "cmdline"))
		all = append(all, process{pid, session, strings.ReplaceAll(string(line), "\x00", " ")})
	}
	return all
}

// processesOf lists the processes with dir in their command line, the lab's
// watchdog and ourselves excepted.
func processesOf(dir string) []process {
	var found []process
	for _, p := range processes() {
		if strings.Contains(p.command, dir+"/") && p.pid != os.Getpid() {
			found = append(found, p)
		}
	}
	return found
}

// runTool runs a program to its end and returns what it printed.
func runTool(t testing.TB, limit time.Duration, stdin io.Reader, argv ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	out := &buffer{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, out, out
	cmd.WaitDelay = time.Second
	must(t, cmd.Start())
	timer := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if !timer.Stop() {
		err = fmt.Errorf("killed after %v", limit)
	}
	return out.String(), err
}

// buffer is a bytes.Buffer for one writer and many readers.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
