package spool

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// ring holds the newest octets of a message: the one at position n lies at
// n modulo its size, which is a power of two.
type ring []byte

// put stores p, which fits, from position at on.
func (b ring) put(p []byte, at int64) {
	n := copy(b[at&int64(len(b)-1):], p)
	copy(b, p[n:])
}

// view returns what lies in one piece of the octets from position at to
// position to.
func (b ring) view(at, to int64) []byte {
	i := at & int64(len(b)-1)
	return b[i:min(i+to-at, int64(len(b)))]
}

// Buffers go from message to message, by size.
var (
	smallBuffers = sync.Pool{New: func() any { return new([small]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([Memory]byte) }}
)

// getBuffer returns a small buffer where size fits into it, else a large one.
func getBuffer(size int) []byte {
	if size <= small {
		return smallBuffers.Get().(*[small]byte)[:]
	}
	return largeBuffers.Get().(*[Memory]byte)[:]
}

// putBuffer takes back what getBuffer returned, or nil.
func putBuffer(b []byte) {
	switch len(b) {
	case small:
		smallBuffers.Put((*[small]byte)(b))
	case Memory:
		largeBuffers.Put((*[Memory]byte)(b))
	}
}

// anonymousFile opens a file in dir that has no name and never gets one, so
// that a crash leaves nothing behind.
func anonymousFile(dir string) (*os.File, error) {
	file, err := os.OpenFile(dir, unix.O_TMPFILE|unix.O_EXCL|os.O_RDWR, 0o600)
	// open(2): EISDIR from kernels, EOPNOTSUPP from file systems without it.
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EOPNOTSUPP) {
		return unlinkedFile(dir)
	}
	return file, err
}

// unlinkedFile does the same by removing the name at once.
func unlinkedFile(dir string) (*os.File, error) {
	file, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("unlink the spool file: %w", err)
	}
	return file, nil
}
