package statedir

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/posthouse/posthouse/routing"
)

var _ routing.Local = (*Dir)(nil)

// childEnv makes the test binary a frontend process: "VERB DIR [ROLE]".
const childEnv = "POSTHOUSE_STATEDIR_CHILD"

func TestMain(m *testing.M) {
	if args := strings.Fields(os.Getenv(childEnv)); len(args) > 0 {
		if err := beChild(args[0], args[1], append(args, "")[2]); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// beChild remembers role for the users it reads on standard input, and says
// what is remembered; or saves one snapshot.
func beChild(verb, path, role string) error {
	runtime.LockOSThread() // strace counts calls per thread
	d, err := Open(path)
	if err != nil {
		return err
	}
	switch verb {
	case "remember":
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			got, err := d.Remember(in.Text(), role)
			if err != nil {
				return err
			}
			fmt.Println(got)
		}
		return nil
	case "save":
		if err := d.SaveSnapshot(9, []byte("nine")); err != nil {
			return err
		}
		fmt.Println("saved")
		return nil
	}
	return errors.New("unknown verb " + verb)
}

type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func start(t *testing.T, strace []string, verb, path, role string) *child {
	t.Helper()
	argv := []string{os.Args[0]}
	if strace != nil {
		bin, err := exec.LookPath("strace")
		if err != nil {
			t.Fatal("strace is missing: apt-get install strace (make deps does it)")
		}
		argv = append(append([]string{bin, "-f", "-y", "-qq"}, strace...), argv...)
	}
	c := &child{cmd: exec.Command(argv[0], argv[1:]...)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+verb+" "+path+" "+role)
	c.cmd.Stderr = os.Stderr
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in, bufio.NewScanner(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	return c
}

// ask sends one line and returns the next; "" at the end of the output.
func (c *child) ask(line string) string {
	_, _ = fmt.Fprintln(c.in, line)
	if !c.out.Scan() {
		return ""
	}
	return c.out.Text()
}

func (c *child) kill() {
	if c.cmd.ProcessState == nil {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	}
}

// end closes the child's input and waits for it.
func (c *child) end() {
	_ = c.in.Close()
	for c.out.Scan() {
	}
	_ = c.cmd.Wait()
}

func openDir(t testing.TB, path string) *Dir {
	t.Helper()
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

const idHere, idThere = "3d1219c7c4c5404aaa1f6d2a48adfda4\n", "00000000c4c5404aaa1f6d2a48adfda4\n"

// A copied state_dir is refused, with what to do.
func TestSafety09Copied(t *testing.T) {
	base := t.TempDir()
	state := filepath.Join(base, "new", "state")
	id, dbus := filepath.Join(base, "machine-id"), filepath.Join(base, "dbus-id")
	paths := []string{id, dbus}

	if _, err := open(state, paths); err == nil || !strings.Contains(err.Error(), "systemd-machine-id-setup") {
		t.Errorf("a machine without an ID: %v", err)
	}
	writeFile(t, id, "uninitialized\n") // machine-id(5): not yet
	writeFile(t, dbus, idHere)
	d, err := open(state, paths)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(state)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("created with %v, %v; want 0700", info.Mode(), err)
	}
	writeFile(t, id, idHere)
	if d, err = open(state, paths); err != nil {
		t.Fatalf("the same machine again: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	writeFile(t, id, idThere)
	_, err = open(state, paths)
	if err == nil || !strings.Contains(err.Error(), "was copied") || !strings.Contains(err.Error(), "delete "+filepath.Join(state, "machine-id")) {
		t.Errorf("another machine's state_dir: %v", err)
	}
	writeFile(t, filepath.Join(state, "machine-id"), "") // damaged: whose it is cannot be told
	if _, err = open(state, paths); err == nil {
		t.Error("a state_dir with an empty machine-id was taken")
	}
}

func TestSafety13NetworkFileSystems(t *testing.T) {
	for magic, want := range map[int64]string{
		0x6969: "NFS", 0xFF534D42: "CIFS", -0xACB2BE: "CIFS", 0xFE534D42: "SMB2", 0x65735546: "FUSE", 0x01021997: "9P",
	} {
		if _, err := judgeFS(magic); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("magic %#x: %v, want %s refused", magic, err, want)
		}
	}
	for magic, want := range map[int64]string{0xEF53: "", 0x58465342: "", 0x9123683E: "", 0x01021994: "tmpfs"} {
		if volatile, err := judgeFS(magic); err != nil || volatile != want {
			t.Errorf("magic %#x: %q, %v; want %q", magic, volatile, err, want)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	base := t.TempDir()
	file, public := filepath.Join(base, "file"), filepath.Join(base, "public")
	writeFile(t, file, "x")
	if err := os.Mkdir(public, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(public, 0o777); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{file: "not a directory", public: "chmod 0700"} {
		if _, err := Open(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

// A lock file removed by hand locks nobody out: who held it, holds nothing
// that a newcomer could see, but two newcomers still exclude each other.
func TestLock(t *testing.T) {
	d := openDir(t, t.TempDir())
	l, err := d.TryLock("l", Exclusive)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.TryLock("l", Shared); !errors.Is(err, ErrLocked) {
		t.Errorf("a second lock: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.Lock(ctx, "l", Shared); !errors.Is(err, ErrLocked) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a wait that ended: %v", err)
	}
	if held, err := d.IsHeld("l"); !held || err != nil {
		t.Errorf("IsHeld = %v, %v", held, err)
	}
	l.Unlock()
	l.Unlock()
	var shared [2]*Lock
	for i := range shared {
		if shared[i], err = d.TryLock("l", Shared); err != nil {
			t.Fatal(err)
		}
		defer shared[i].Unlock()
	}
	if err := os.Remove(d.join("l")); err != nil {
		t.Fatal(err)
	}
	l, err = d.TryLock("l", Exclusive)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Unlock()
	if _, err := d.TryLock("l", Exclusive); !errors.Is(err, ErrLocked) {
		t.Errorf("two own a lock that was removed and made anew: %v", err)
	}
	if _, err := d.CreateLock("l"); !errors.Is(err, os.ErrExist) {
		t.Errorf("CreateLock took an old file: %v", err)
	}
}
