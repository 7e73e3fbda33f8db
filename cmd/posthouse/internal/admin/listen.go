package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// knockTimeout bounds the question whether somebody serves a socket.
const knockTimeout = 2 * time.Second

// umask is of the whole process: one Listen at a time.
var umask sync.Mutex

// Listen creates the unix socket at path with the permissions mode. A socket
// that a process left behind is replaced, one that is served is not. Closing
// the listener removes the socket.
func Listen(path string, mode fs.FileMode) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) {
		var why *os.SyscallError // the path is said already
		if errors.As(err, &why) {
			err = why.Err
		}
		return nil, fmt.Errorf("unix socket %s: %w", path, err)
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fail(err)
	case info.Mode().Type() != fs.ModeSocket:
		return fail(errors.New("there is something that is not a socket: remove it, or choose another path"))
	default:
		if err := removeStale(path); err != nil {
			return fail(err)
		}
	}
	l, err := listenClosed(path, mode)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fail(fmt.Errorf("there is no directory %s: create it (systemd: RuntimeDirectory=)", filepath.Dir(path)))
	case err != nil:
		return fail(err)
	}
	if err := os.Chmod(path, mode.Perm()); err != nil {
		_ = l.Close()
		return fail(err)
	}
	return l, nil
}

// listenClosed listens on a socket that is open to nobody beside its owner and
// mode, from its first moment on.
func listenClosed(path string, mode fs.FileMode) (net.Listener, error) {
	umask.Lock()
	defer umask.Unlock()
	// The owner's bits stay: a directory that is made meanwhile needs them.
	defer syscall.Umask(syscall.Umask(0o077 &^ int(mode.Perm())))
	return net.Listen("unix", path)
}

// removeStale removes a socket at which nobody answers.
func removeStale(path string) error {
	ctx, cancel := context.WithTimeout(context.Background(), knockTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		_ = conn.Close()
		return errors.New("another process serves it: stop that one, or give this one another admin.socket")
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	case errors.Is(err, fs.ErrNotExist): // it has just gone
		return nil
	}
	return fmt.Errorf("cannot tell whether another process serves it: %w", err)
}
