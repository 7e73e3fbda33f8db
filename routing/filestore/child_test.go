package filestore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

// childEnv makes the test binary a frontend process: "VERB DIR [NAME]".
const childEnv = "POSTHOUSE_FILESTORE_CHILD"

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

// beChild is one process. It says what it did on standard output and, where it
// would go on for ever, ends when its standard input does.
func beChild(verb, path, name string) error {
	// strace counts calls per thread.
	runtime.LockOSThread()
	if verb == "block" {
		fmt.Println("ready")
		return untilEOF()
	}
	dir, err := statedir.Open(path)
	if err != nil {
		return err
	}
	s, err := Open(dir, nil)
	if err != nil {
		return err
	}
	ctx := context.Background()
	switch verb {
	case "load":
		state, err := s.Load(ctx)
		if err != nil {
			return err
		}
		fmt.Println("revision", state.Revision)
		return nil
	case "update":
		state, err := s.Update(ctx, count(name))
		if err != nil {
			return err
		}
		fmt.Println("revision", state.Revision)
		return nil
	case "write":
		for {
			state, err := s.Update(ctx, count(name))
			if err != nil {
				return err
			}
			fmt.Println(state.Roles[name].Epoch)
		}
	case "live":
		if err := s.Join(ctx, name); err != nil {
			return err
		}
		if _, _, err := s.Campaign(ctx); err != nil {
			return err
		}
		fmt.Println("ready")
		return untilEOF()
	case "hook":
		return withHook(ctx, s, path, name)
	}
	return errors.New("unknown verb " + verb)
}

// withHook lives and drives, and has a child as a driver's hook would be.
func withHook(ctx context.Context, s *Store, path, name string) error {
	if err := s.Join(ctx, name); err != nil {
		return err
	}
	if _, _, err := s.Campaign(ctx); err != nil {
		return err
	}
	hook := exec.Command(os.Args[0])
	hook.Env = append(os.Environ(), childEnv+"=block "+path)
	hook.Stdin, hook.Stdout = os.Stdin, os.Stdout // its "ready" is ours
	if err := hook.Start(); err != nil {
		return err
	}
	return hook.Wait()
}

func untilEOF() error {
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func count(name string) func(*routing.State) error {
	return func(s *routing.State) error {
		row := s.Roles[name]
		row.Epoch++
		s.Roles[name] = row
		return nil
	}
}

// child is a started process.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// start runs "VERB DIR NAME", under strace if options for it are given.
func start(t *testing.T, strace []string, verb, path, name string) *child {
	t.Helper()
	argv := []string{os.Args[0]}
	if strace != nil {
		bin, err := exec.LookPath("strace")
		if err != nil {
			t.Fatal("strace is missing: apt-get install strace (make deps does it)")
		}
		argv = append(append([]string{bin, "-f", "-y", "-qq"}, strace...), argv...)
	}
	c := &child{t: t, cmd: exec.Command(argv[0], argv[1:]...)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+verb+" "+path+" "+name)
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

// line returns the next line of output, "" at its end.
func (c *child) line() string {
	if !c.out.Scan() {
		return ""
	}
	return c.out.Text()
}

func (c *child) ready() *child {
	c.t.Helper()
	if got := c.line(); got != "ready" {
		c.t.Fatalf("the child said %q, want ready", got)
	}
	return c
}

func (c *child) kill() {
	if c.cmd.ProcessState != nil {
		return
	}
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// finish runs a child to its end and returns all that it said.
func finish(t *testing.T, strace []string, verb, path, name string) string {
	t.Helper()
	c := start(t, strace, verb, path, name)
	var said []string
	for line := c.line(); line != ""; line = c.line() {
		said = append(said, line)
	}
	_ = c.cmd.Wait() // an error of the child is in what it said
	return strings.Join(said, "\n")
}
