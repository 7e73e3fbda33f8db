package main

import (
	"context"
	"errors"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"posthouse": main})
}

// TestScripts runs the command line as operators do, each script against a
// demo of its own at $SOCKET.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:  "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
		Setup: func(env *testscript.Env) error {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			r, err := runDemo(ctx, shortDir(t), 0)
			if err != nil {
				cancel()
				return err
			}
			env.Defer(func() {
				r.stop()
				if err := <-r.ended; err != nil {
					t.Error(err)
				}
				cancel()
			})
			env.Setenv("SOCKET", r.socket)
			return nil
		},
	})
}

// exits CODE PROGRAM ARGS… is exec of a program that must fail with this code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARGS…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	var ended *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); !errors.As(err, &ended) || ended.ExitCode() != want {
		ts.Fatalf("%q: %v, want exit code %d", args[1:], err, want)
	}
}
