package directory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/posthouse/posthouse/routing"
)

// File is a directory in a text file. One line is one user or one alias:
//
//	# a comment; also behind a blank
//	alice@example.org: ma01
//	postmaster@example.org -> alice@example.org
//
// An alias leads to a user of the same file, not to another alias: the user
// that a lookup returns is always the name left of a colon. No name stands
// twice. Replace the file by rename, not by writing into it.
//
// All methods may be called at once; Lookup takes no lock.
type File struct {
	path      string
	normalise func(string) (string, error)

	reloading sync.Mutex
	now       atomic.Pointer[users]
}

var _ routing.Directory = (*File)(nil)

// Report is what a Reload has changed.
type Report struct {
	Users   int // users in the file now
	Aliases int
	Added   int // users that were not in it before
	Removed int // users that are no longer in it
	// Moved are users that have another role than before, sorted; the first
	// movedMax of MovedTotal. Each is a role disagreement until it is moved
	// with posthouse move (safety 26).
	Moved      []Moved
	MovedTotal int
}

// Moved is a user whose role has changed.
type Moved struct{ User, From, To string }

const (
	// movedMax bounds Report.Moved: enough to see what is going on.
	movedMax = 100

	// fileMax bounds the file: 10 million users take 0.4 GB.
	fileMax = 2 << 30
)

// NewFile reads the file at path. normalise makes the canonical form of a name
// as it makes it of what clients send; nil takes names as they are written.
// The error names every bad line (up to 100) with file:line.
func NewFile(path string, normalise func(string) (string, error)) (*File, error) {
	if normalise == nil {
		normalise = func(name string) (string, error) { return name, nil }
	}
	f := &File{path: path, normalise: normalise}
	now, err := f.load()
	if err != nil {
		return nil, err
	}
	f.now.Store(now)
	return f, nil
}

// Path is where the file lies.
func (f *File) Path() string { return f.path }

// Lookup implements routing.Directory. It cannot but tell.
func (f *File) Lookup(ctx context.Context, name string) (routing.Entry, error) {
	if err := ctx.Err(); err != nil {
		return routing.Entry{}, err
	}
	return f.now.Load().lookup(name)
}

// Reload reads the file again. If anything is wrong with it nothing changes,
// and the error names every bad line as NewFile's does.
func (f *File) Reload() (Report, error) {
	f.reloading.Lock()
	defer f.reloading.Unlock()
	next, err := f.load()
	if err != nil {
		return Report{}, err
	}
	report := compare(f.now.Load(), next)
	f.now.Store(next)
	return report, nil
}

func (f *File) load() (*users, error) {
	data, err := readWhole(f.path)
	if err != nil {
		return nil, fmt.Errorf("directory file: %w", err)
	}
	return parse(f.path, data, f.normalise)
}

// errChanging: half a file would make users "certainly absent", and bounce
// their mail.
var errChanging = errors.New("was written to while it was read; replace it by rename")

func readWhole(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	before, err := f.Stat()
	if err != nil {
		return "", err
	}
	switch {
	case !before.Mode().IsRegular():
		return "", fmt.Errorf("%s is not a regular file", path)
	case before.Size() == 0:
		return "", fmt.Errorf("%s is empty; a file without users has a comment in it", path)
	case before.Size() > fileMax:
		return "", fmt.Errorf("%s has more than %d bytes", path, fileMax)
	}
	data := make([]byte, before.Size())
	if _, err := io.ReadFull(f, data); err != nil {
		return "", fmt.Errorf("%s: %w: %w", path, errChanging, err)
	}
	after, err := f.Stat()
	if err != nil {
		return "", err
	}
	if after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
		return "", fmt.Errorf("%s %w", path, errChanging)
	}
	return string(data), nil
}

// compare says what is different in next.
func compare(old, next *users) Report {
	r := Report{Users: len(next.role), Aliases: len(next.alias)}
	for user, i := range next.role {
		j, known := old.role[user]
		from, to := "", next.roles[i]
		if known {
			from = old.roles[j]
		}
		switch {
		case !known:
			r.Added++
		case from != to:
			r.Moved = append(r.Moved, Moved{user, from, to})
		}
	}
	r.Removed = len(old.role) - (len(next.role) - r.Added)
	slices.SortFunc(r.Moved, func(a, b Moved) int { return cmp.Compare(a.User, b.User) })
	r.MovedTotal = len(r.Moved)
	r.Moved = slices.Clone(r.Moved[:min(movedMax, len(r.Moved))])
	return r
}
