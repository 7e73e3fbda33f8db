package filestore

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

func TestJoinRefusesNames(t *testing.T) {
	s := openStore(t, t.TempDir())
	for _, id := range []string{"", ".", "..", "../x", "a/b", ".hidden", "a b", "a\x00", strings.Repeat("a", 201)} {
		if err := s.Join(t.Context(), id); err == nil {
			t.Errorf("ID %q was accepted", id)
		}
	}
}

// An ID in the table was used, whatever lock files there are.
func TestJoinRefusesRegistered(t *testing.T) {
	s := openStore(t, t.TempDir())
	if _, err := s.Update(t.Context(), func(s *routing.State) error {
		s.Frontends["f1-aaaa"] = routing.Frontend{}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Join(t.Context(), "f1-aaaa"); err == nil {
		t.Error("a registered ID was accepted")
	}
	// Its lock file is missing: that proves nothing.
	if gone, err := s.Gone(t.Context(), []string{"f1-aaaa"}); err != nil || len(gone) != 0 {
		t.Errorf("Gone = %v, %v", gone, err)
	}
}

// Old lock files go, but neither those of the living nor those of the
// registered, whose end they will have to prove.
func TestJoinSweeps(t *testing.T) {
	path := t.TempDir()
	s, living := openStore(t, path), openStore(t, path)
	if err := living.Join(t.Context(), "f0-living"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context(), func(s *routing.State) error {
		s.Frontends["f0-registered"] = routing.Frontend{}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(path, frontends)
	old := []string{"f0-registered"}
	for i := range goneKept + 50 {
		old = append(old, fmt.Sprintf("f1-%05d", i))
	}
	for _, id := range old {
		if err := os.WriteFile(filepath.Join(dir, id+".lock"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Join(t.Context(), "f2-new"); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.lock"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < goneKept || len(files) > goneKept+2 {
		t.Errorf("%d lock files are left, want about %d", len(files), goneKept)
	}
	for _, id := range []string{"f0-living", "f0-registered", "f2-new", old[len(old)-1]} {
		if !slices.Contains(files, filepath.Join(dir, id+".lock")) {
			t.Errorf("the lock file of %s was removed", id)
		}
	}
	if gone, err := s.Gone(t.Context(), []string{"f0-living", "f2-new", "f0-registered"}); err != nil || !slices.Equal(gone, []string{"f0-registered"}) {
		t.Errorf("Gone = %v, %v", gone, err)
	}
}

func TestClosed(t *testing.T) {
	s := openStore(t, t.TempDir())
	w := s.Watch(t.Context())
	<-w
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if state, open := <-w; open {
		t.Errorf("a closed store's watch sent %+v", state)
	}
	if _, open := <-s.Watch(t.Context()); open {
		t.Error("a closed store can be watched")
	}
	if _, err := s.Load(t.Context()); err == nil {
		t.Error("a closed store can be read")
	}
	if err := s.Join(t.Context(), "f1-aaaa"); err == nil {
		t.Error("a closed store can be joined")
	}
}

// A lock that somebody keeps is a temporary error within the caller's time.
func TestLockIsKept(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	l, err := s.dir.TryLock(tableLock, statedir.Exclusive)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := s.Load(t.Context())
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("Load came back under another's lock: %v", err)
	default:
	}
	if err := s.Close(); err != nil { // ends the wait
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("a closed store was read")
	}
	l.Unlock()
}

func BenchmarkUpdate(b *testing.B) {
	s := openStore(b, b.TempDir())
	for b.Loop() {
		if _, err := s.Update(b.Context(), count("r")); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoad1000Roles(b *testing.B) {
	s := openStore(b, b.TempDir())
	if _, err := s.Update(b.Context(), func(s *routing.State) error {
		for i := range 1000 {
			s.Roles[fmt.Sprintf("ma%04d", i)] = routing.Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: routing.PhaseOpen}
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Load(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
