package directory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
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

const (
	// movedMax is how many users an error names that have another role.
	movedMax = 5

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

// Reload reads the files of a Chain again: all, or, if anything is wrong with one
// of them, none. The error names every bad line as NewFile's does.
//
// A user who has another role than before is wrong, too: sessions may be in the
// old one, here or at frontends that nobody has told yet, and this one would open
// the other backend beside it (safety 26). last is the role in which a user was
// last, "" if that is not known: of who was not in the files, or went back to it,
// it decides.
func Reload(files []*File, last func(user string) (role string, err error)) error {
	old, next := make([]*users, len(files)), make([]*users, len(files))
	var errs []error
	for i, f := range files {
		f.reloading.Lock()
		defer f.reloading.Unlock()
		var err error
		next[i], err = f.load()
		errs, old[i] = append(errs, err), f.now.Load()
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := refuseMoves(old, next, last); err != nil {
		return err
	}
	for i, f := range files {
		f.now.Store(next[i])
	}
	return nil
}

// refuseMoves names the users who would get another role.
func refuseMoves(old, next []*users, last func(user string) (role string, err error)) error {
	moved := make(map[string]string)
	for _, file := range next {
		for user := range file.role {
			was, is := roleIn(old, user), roleIn(next, user)
			if was == is {
				continue
			}
			remembered, err := last(user)
			if err != nil {
				return fmt.Errorf("whether %s was in another role: %w", user, err)
			}
			if remembered != "" {
				was = remembered
			}
			if was != "" && was != is {
				moved[user] = fmt.Sprintf("%s (%s, was in %s)", user, is, was)
			}
		}
	}
	if len(moved) == 0 {
		return nil
	}
	var text []string
	for _, user := range slices.Sorted(maps.Keys(moved))[:min(movedMax, len(moved))] {
		text = append(text, moved[user])
	}
	if more := len(moved) - len(text); more > 0 {
		text = append(text, fmt.Sprintf("and %d more", more))
	}
	return fmt.Errorf("%d users have another role, and may be inside the old one still, which would put them on two backends: %s: "+
		"take that back, or move them with all frontends stopped: see docs/configuration.md, \"Another role for a user\"",
		len(moved), strings.Join(text, ", "))
}

// roleIn is the role that a Chain of files gives a user; "" if none does.
func roleIn(chain []*users, user string) string {
	for _, u := range chain {
		if entry, err := u.lookup(user); err == nil {
			if entry.User != user {
				return "" // an alias: nobody gets there
			}
			return entry.Role
		}
	}
	return ""
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
