package etcdstore

import (
	"net"
	"sync"
	"testing"
)

// cable is a way to etcd that can be cut.
type cable struct {
	url string
	to  string
	l   net.Listener

	mu    sync.Mutex
	isCut bool
	mute  bool // what etcd says is lost
	conns map[net.Conn]struct{}
	ends  sync.WaitGroup
}

func newCable(t *testing.T, to *server) *cable {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cable{url: "http://" + l.Addr().String(), to: to.url[len("http://"):], l: l, conns: map[net.Conn]struct{}{}}
	c.ends.Go(c.accept)
	t.Cleanup(func() {
		_ = l.Close()
		c.cut()
		c.ends.Wait()
	})
	return c
}

func (c *cable) accept() {
	for {
		near, err := c.l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", c.to)
		if err != nil || !c.plug(near, far) {
			_ = near.Close()
			continue
		}
		c.ends.Go(func() { c.carry(far, near, false) })
		c.ends.Go(func() { c.carry(near, far, true) })
	}
}

func (c *cable) plug(near, far net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isCut {
		_ = far.Close()
		return false
	}
	c.conns[near], c.conns[far] = struct{}{}, struct{}{}
	return true
}

func (c *cable) carry(to, from net.Conn, isAnswer bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		c.mu.Lock()
		lost := isAnswer && c.mute
		c.mu.Unlock()
		if !lost && n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// silence loses what etcd says on the connections there are.
func (c *cable) silence() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mute = true
}

// cut ends all connections, and lets no new ones in.
func (c *cable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.isCut = true
	for conn := range c.conns {
		_ = conn.Close()
	}
	clear(c.conns)
}

func (c *cable) mend() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.isCut, c.mute = false, false
}
