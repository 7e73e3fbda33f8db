package hookrun

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/posthouse/posthouse/routing"
)

func call(hook routing.Hook) routing.HookCall {
	return routing.HookCall{Hook: hook, Roles: []string{"ma01", "ma02"}, From: "a", To: "b", Number: 7, Epoch: 12, Attempt: 3}
}

// shell makes a runner whose demote hook is a script of its own.
func shell(t *testing.T, script string) *Runner {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hook")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return &Runner{Roles: map[string]Commands{"ma01": {routing.HookDemote: {path, "an argument; $(true)"}}}}
}

func TestHookGetsWhatItNeeds(t *testing.T) {
	r := shell(t, `echo "$POSTHOUSE_ROLE|$POSTHOUSE_ROLES|$POSTHOUSE_FROM|$POSTHOUSE_TO|$POSTHOUSE_SWITCH|$POSTHOUSE_EPOCH|$POSTHOUSE_STEP|$POSTHOUSE_ATTEMPT|$#|$1" >&2`)
	out, err := r.Run(t.Context(), call(routing.HookDemote))
	if want := "ma01|ma01 ma02|a|b|7|12|demote|3|1|an argument; $(true)"; err != nil || out != want {
		t.Errorf("%q, %v; want %q", out, err, want)
	}
}

// The list of users is there while the hook runs, and nothing stays behind.
func TestHookGetsTheUsers(t *testing.T) {
	r := shell(t, `[ -n "$POSTHOUSE_USERS" ] || { echo all; exit; }; cat "$POSTHOUSE_USERS"`)
	r.Dir = t.TempDir()
	for _, c := range []struct {
		seen routing.Seen
		want string
	}{
		{routing.Seen{All: true}, "all"},
		{routing.Seen{Users: []string{"alice", "bob smith"}}, "alice\nbob smith"},
		{routing.Seen{}, ""},
	} {
		asked := call(routing.HookDemote)
		asked.Seen = c.seen
		if out, err := r.Run(t.Context(), asked); err != nil || out != c.want {
			t.Errorf("%+v: %q, %v", c.seen, out, err)
		}
	}
	if left, err := os.ReadDir(r.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Drivers that were killed have left their lists behind. The next list that is
// made takes them away; not one that is in use, by a sibling or by a hook that has
// outlived its driver by a moment, nor what is no list.
func TestListsOfKilledDriversGo(t *testing.T) {
	r := shell(t, `ls "$(dirname "$POSTHOUSE_USERS")" | sed "s/^$(basename "$POSTHOUSE_USERS")$/its own/"`)
	r.Dir = t.TempDir()
	sibling := &Runner{Dir: r.Dir}
	inUse, err := sibling.list(routing.Seen{Users: []string{"alice"}})
	if err != nil {
		t.Fatal(err)
	}
	defer inUse.Close()
	for name, age := range map[string]time.Duration{"users-1": 2 * time.Hour, "users-2": 50 * time.Hour, "users-3": time.Minute,
		"roles-last-used": 50 * time.Hour, filepath.Base(inUse.Name()): 50 * time.Hour} {
		path := filepath.Join(r.Dir, name)
		f, err := os.OpenFile(path, os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	asked := call(routing.HookDemote)
	asked.Seen = routing.Seen{Users: []string{"bob"}}
	out, err := r.Run(t.Context(), asked)
	left := strings.Fields(strings.ReplaceAll(out, "its own", ""))
	slices.Sort(left)
	want := []string{"roles-last-used", "users-3", filepath.Base(inUse.Name())}
	slices.Sort(want)
	if err != nil || !slices.Equal(left, want) || !strings.Contains(out, "its own") {
		t.Errorf("beside its own list there are %v, want %v: %v", left, want, err)
	}
}

func TestHowAHookEnds(t *testing.T) {
	for _, c := range []struct {
		script, output string
		fails, again   bool
	}{
		{"echo done", "done", false, false},
		{"echo no; exit 1", "no", true, false},
		{"echo busy; exit 75", "busy", true, true},
		{"kill -9 $$", "", true, false},
		{"head -c 5000 /dev/zero | tr '\\0' x; echo; echo end", "end", false, false},
	} {
		out, err := shell(t, c.script).Run(t.Context(), call(routing.HookDemote))
		if !strings.HasSuffix(out, c.output) || len(out) > outputKept+4 || (err != nil) != c.fails || errors.Is(err, routing.ErrTryAgain) != c.again {
			t.Errorf("%s: %d octets %.20q, %v", c.script, len(out), out, err)
		}
	}
	if _, err := shell(t, "true").Run(t.Context(), call(routing.HookPromote)); err == nil || !strings.Contains(err.Error(), "no promote hook") {
		t.Errorf("a hook that is not there: %v", err)
	}
	r := &Runner{Roles: map[string]Commands{"ma01": {routing.HookDemote: {"/nonexistent/hook"}}}}
	if _, err := r.Run(t.Context(), call(routing.HookDemote)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a program that is not there: %v", err)
	}
}

// Nothing of a hook outlives Run: neither one that ignores SIGTERM nor what it
// has started.
func TestNothingOfAHookOutlivesRun(t *testing.T) {
	for name, script := range map[string]string{
		"obeys":        "sleep 60 & echo $! >$0.pid; : >$0.ready; wait",
		"ignores TERM": "trap '' TERM; sleep 60 & echo $! >$0.pid; : >$0.ready; while :; do sleep 0.1; done",
		"has ended":    "sleep 60 & echo $! >$0.pid; : >$0.ready",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := shell(t, script)
			path := r.Roles["ma01"][routing.HookDemote][0]
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				for ctx.Err() == nil {
					if _, err := os.Stat(path + ".ready"); err == nil && name != "has ended" {
						cancel()
					}
					time.Sleep(10 * time.Millisecond) // real processes: there is nothing to wait on
				}
			}()
			began := time.Now()
			_, err := r.Run(ctx, call(routing.HookDemote))
			if (err != nil) != (name != "has ended") || time.Since(began) > 30*time.Second {
				t.Errorf("%v after %v", err, time.Since(began))
			}
			text, err := os.ReadFile(path + ".pid")
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			if err != nil {
				t.Fatal(err)
			}
			if !hasEnded(pid) {
				t.Errorf("process %d of the hook lives on", pid)
			}
		})
	}
}

// hasEnded waits until a process is gone, or a zombie that nobody has buried.
func hasEnded(pid int) bool {
	for range 300 {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return true
		}
		if syscall.Kill(pid, 0) != nil {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

// What a hook writes is in the log, line by line, whatever its pieces; the last line
// too, and not for ever.
func TestOutputIsLogged(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	r := shell(t, `printf one; printf ' and two\n\nthree\n' >&2; head -c 9000 /dev/zero | tr '\0' x; printf '\nlast'`)
	r.Log = zap.New(core)
	if _, err := r.Run(t.Context(), call(routing.HookDemote)); err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, e := range logs.All() {
		said = append(said, e.ContextMap()["text"].(string))
	}
	x := strings.Repeat("x", longestLine)
	want := []string{"one and two", "three", x, x, x[:9000-2*longestLine], "last"}
	if !slices.Equal(said, want) {
		t.Errorf("%q", said)
	}
	o := outputLog{log: zap.New(core)}
	for range 2 * outputLogged / 1000 {
		fmt.Fprintln(&o, strings.Repeat("y", 1000))
	}
	if n := logs.FilterMessage("hook says more than is logged").Len(); n != 1 || logs.FilterMessage("hook says").Len() > outputLogged/1000+100 {
		t.Errorf("%d warnings, %d lines", n, logs.Len())
	}
}
