package filestore

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/posthouse/posthouse/routing"
)

// Eight processes write, five of them are killed with SIGKILL in mid-work and
// replaced. What a writer was told is committed is in the table, once; nobody
// ever reads a torn file. Mutation: flock table.json itself instead of
// table.lock, and updates are lost.
func TestSafety12Writers(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	const writers, killed, enough = 8, 5, 20
	acked := make([]uint64, writers+killed)
	write := func(i int, until uint64) {
		c := start(t, nil, "write", path, fmt.Sprint("w", i))
		defer c.kill()
		for acked[i] < until {
			n, err := strconv.ParseUint(c.line(), 10, 64)
			if err != nil {
				t.Errorf("writer %d: %v", i, err)
				return
			}
			acked[i] = n
		}
	}
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			if i >= killed {
				write(i, enough)
				return
			}
			write(i, uint64(3+i))
			write(writers+i, enough)
		})
	}
	written := make(chan struct{})
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		readAlong(t, s, written)
	}()
	wg.Wait()
	close(written)
	<-reading

	state, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var sum uint64
	for i, told := range acked {
		there := state.Roles[fmt.Sprint("w", i)].Epoch
		// Every writer ends by SIGKILL: one update may be there untold, and
		// more lines may have been said than were read.
		if there < told {
			t.Errorf("writer %d was told that %d updates are committed, %d are there", i, told, there)
		}
		sum += there
	}
	if sum != state.Revision {
		t.Errorf("%d updates are there, revision is %d", sum, state.Revision)
	}
}

func readAlong(t *testing.T, s *Store, until <-chan struct{}) {
	var last uint64
	for {
		state, err := s.Load(t.Context())
		if err != nil {
			t.Errorf("Load beside the writers: %v", err)
			return
		}
		if state.Revision < last {
			t.Errorf("revision %d after %d", state.Revision, last)
		}
		last = state.Revision
		select {
		case <-until:
			return
		default:
		}
	}
}

// A frontend lives exactly as long as its process: stopped it is not gone,
// killed it is, and a hook that outlives it keeps none of its locks.
func TestSafety12Liveness(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	gone := func() []string {
		t.Helper()
		ids, err := s.Gone(t.Context(), []string{"f1-aaaa", "f2-bbbb"})
		if err != nil {
			t.Fatal(err)
		}
		return ids
	}

	f1 := start(t, nil, "live", path, "f1-aaaa").ready()
	if err := f1.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if ids := gone(); len(ids) != 0 {
		t.Errorf("a stopped frontend is said to be gone: %v", ids)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, release, err := s.Campaign(ctx); err == nil {
		release()
		t.Error("a second driver beside a stopped one")
	}
	f1.kill()
	if ids := gone(); !slices.Equal(ids, []string{"f1-aaaa"}) {
		t.Errorf("Gone = %v after SIGKILL", ids)
	}

	f2 := start(t, nil, "hook", path, "f2-bbbb").ready()
	_ = f2.cmd.Process.Kill() // its hook still holds the pipes: no Wait yet
	// The driver's lock comes free although the hook runs.
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, release, err := s.Campaign(ctx)
	if err != nil {
		t.Fatalf("a hook keeps the dead driver's lock: %v", err)
	}
	release()
	if ids := gone(); !slices.Contains(ids, "f2-bbbb") {
		t.Errorf("a hook keeps its dead frontend alive: %v", ids)
	}
	f2.in.Close() // ends the hook
}

// The table is written and fsynced, renamed, the directory is fsynced, and all
// that under the lock. Mutation: unlock before the directory's fsync.
func TestSafety13Order(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	if _, err := s.Update(t.Context(), count("r")); err != nil {
		t.Fatal(err)
	}
	p := regexp.QuoteMeta(path)
	inOrder(t, trace(t, "update", path), []string{
		`flock\(\d+<` + p + `/table\.lock>, LOCK_EX|LOCK_NB\) = 0`,
		`write\(\d+<` + p + `/table\.json\.tmp>`,
		`fsync\(\d+<` + p + `/table\.json\.tmp>`,
		`renameat2?\(.*/table\.json\.tmp".*/table\.json"`,
		`fsync\(\d+<` + p + `>`,
		`flock\(\d+<` + p + `/table\.lock>, LOCK_UN`,
	})
}

// Who finds a table that another process wrote makes it durable before it
// believes it: the writer may have been killed between rename and fsync.
// Mutation: no Sync in readLocked.
func TestSafety13ReaderSyncs(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	if _, err := s.Update(t.Context(), count("r")); err != nil {
		t.Fatal(err)
	}
	p := regexp.QuoteMeta(path)
	inOrder(t, trace(t, "load", path), []string{
		`flock\(\d+<` + p + `/table\.lock>, LOCK_SH|LOCK_NB\) = 0`,
		`openat\(.*/table\.json"`,
		`fsync\(\d+<` + p + `>`,
		`flock\(\d+<` + p + `/table\.lock>, LOCK_UN`,
	})
}

func trace(t *testing.T, verb, path string) string {
	t.Helper()
	log := filepath.Join(t.TempDir(), "strace")
	said := finish(t, []string{"-o", log, "-e", "trace=flock,openat,write,fsync,rename,renameat,renameat2"}, verb, path, "r")
	if !strings.HasPrefix(said, "revision") {
		t.Fatalf("%s: %s", verb, said)
	}
	calls, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return string(calls)
}

// inOrder checks that lines that match come in this order.
func inOrder(t *testing.T, calls string, want []string) {
	t.Helper()
	rest := calls
	for _, pattern := range want {
		pattern = strings.ReplaceAll(pattern, "|LOCK_NB", `\|LOCK_NB`)
		at := regexp.MustCompile(pattern).FindStringIndex(rest)
		if at == nil {
			t.Fatalf("no %s where it belongs in\n%s", pattern, calls)
		}
		rest = rest[at[1]:]
	}
}

// An fsync fails: Update says so, everybody goes on to see the table as it
// was, and the next Update works. The first fsync is the reader's, the second
// the new file's, the third the directory's after the rename.
func TestSafety13FsyncFails(t *testing.T) {
	for n := 1; n <= 3; n++ {
		t.Run(fmt.Sprint("fsync", n), func(t *testing.T) {
			path := t.TempDir()
			s := openStore(t, path)
			if _, err := s.Update(t.Context(), count("r")); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(filepath.Join(path, tableName))
			if err != nil {
				t.Fatal(err)
			}
			said := finish(t, inject(fmt.Sprintf("error=EIO:when=%d", n)), "update", path, "r")
			if !strings.Contains(said, "input/output error") {
				t.Errorf("Update said %q, want an I/O error", said)
			}
			after, err := os.ReadFile(filepath.Join(path, tableName))
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("the table is not as it was before: %v\n%s", err, after)
			}
			if said := finish(t, nil, "update", path, "r"); said != "revision 2" {
				t.Errorf("the next Update said %q", said)
			}
		})
	}
}

// The directory's fsync fails for the very first table: there is none.
func TestSafety13FirstFsyncFails(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	said := finish(t, inject("error=EIO:when=2"), "update", path, "r")
	if !strings.Contains(said, "input/output error") {
		t.Errorf("Update said %q, want an I/O error", said)
	}
	if state, err := s.Load(t.Context()); err != nil || state.Revision != 0 {
		t.Errorf("Load = %+v, %v; want the empty table", state, err)
	}
}

// SIGKILL at each fsync of an Update: the table is the old or the new one,
// whole, no lock is left, and the next Update works.
func TestSafety13Killed(t *testing.T) {
	for n := 1; n <= 3; n++ {
		t.Run(fmt.Sprint("fsync", n), func(t *testing.T) {
			path := t.TempDir()
			s := openStore(t, path)
			if _, err := s.Update(t.Context(), count("r")); err != nil {
				t.Fatal(err)
			}
			if said := finish(t, inject(fmt.Sprintf("signal=SIGKILL:when=%d", n)), "update", path, "r"); said != "" {
				t.Fatalf("the child was to be killed, and said %q", said)
			}
			state, err := s.Load(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if want := uint64(1 + n/3); state.Revision != want {
				t.Errorf("revision %d, want %d", state.Revision, want)
			}
			if next, err := s.Update(t.Context(), count("r")); err != nil || next.Revision != state.Revision+1 {
				t.Errorf("the next Update = %+v, %v", next, err)
			}
		})
	}
}

// inject makes strace tamper with fsync.
func inject(how string) []string {
	return []string{"-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:" + how}
}

// A table that is removed, or replaced by an older copy, is delivered as it
// is; what to think of it is routing's to say. An older copy in a broken state
// is not delivered.
func TestSafety14GoesBack(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	file := filepath.Join(path, tableName)
	commit := func() []byte {
		t.Helper()
		if _, err := s.Update(t.Context(), count("r")); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	old := commit()
	commit()
	commit()
	w := s.Watch(t.Context())
	await(t, w, 3)

	restored := filepath.Join(path, "restored")
	if err := os.WriteFile(restored, old, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(restored, file); err != nil {
		t.Fatal(err)
	}
	await(t, w, 1)
	if state, err := s.Load(t.Context()); err != nil || state.Revision != 1 {
		t.Errorf("Load = %+v, %v; want revision 1", state, err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	await(t, w, 0)
	// Written into in place, and only half of it: not a state, so no news.
	if err := os.WriteFile(file, old[:len(old)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(t.Context()); err == nil {
		t.Error("half a table was loaded")
	}
	if err := os.WriteFile(file, old, 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, w, 1)
}

// await receives the next State, which must have this revision.
func await(t *testing.T, w <-chan *routing.State, revision uint64) {
	t.Helper()
	select {
	case state := <-w:
		if state == nil || state.Revision != revision {
			t.Fatalf("the watch sent %+v, want revision %d", state, revision)
		}
	case <-time.After(5 * time.Second):
		t.Fatalf("the watch did not send revision %d", revision)
	}
}
