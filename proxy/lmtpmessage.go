package proxy

import (
	"fmt"
	"time"
)

// newFilter is the way in for the next message.
func (s *lmtpSession) newFilter() *bodyFilter {
	o := s.server.lmtp.options
	return newBodyFilter(s.normalizes(), o.MaxLine, o.MaxHops, s.size)
}

// data serves DATA: the body goes to all backends at once, while it comes.
func (s *lmtpSession) data(arg string) error {
	t := s.t
	if arg != "" {
		s.say(501, "5.5.4 DATA has no argument")
		return s.c.strike()
	}
	if why := t.start(); why != nil {
		s.reply(*why)
		if t.body != nil {
			s.reset()
		}
		return nil
	}
	s.say(354, "Go ahead, end with <CR><LF>.<CR><LF>")
	if err := s.flush(); err != nil {
		return err
	}
	f := s.newFilter()
	t.write(s.received())
	for {
		p, err := s.fill()
		if err != nil {
			return err
		}
		out, n, done := f.data(s.work[:0], p)
		_, _ = s.c.r.Discard(n) // what was peeked can be discarded
		t.write(out)
		s.work = out
		if done {
			break
		}
		if f.fault() != nil {
			t.drop() // nobody needs the rest
		}
	}
	s.finish(f)
	return nil
}

// finish ends the transaction after the complete message.
func (s *lmtpSession) finish(f *bodyFilter) {
	t := s.t
	defer func() { s.t, s.chunks, s.forwarded = nil, nil, unknownPeer }()
	s.c.strikes = 0
	t.octets = f.octets()
	s.server.metrics.lmtp.octets.Add(float64(t.octets))
	if fault := f.fault(); fault != nil {
		verdict := replyTo(fault)
		t.finish(&verdict)
		return
	}
	t.finish(nil)
}

// received is our trace field (RFC 5321 §4.4, RFC 3848): without it a loop
// through us would never be seen. The names come from helloName and
// parseAttributes, which leave no line ends in them.
func (s *lmtpSession) received() []byte {
	with := "LMTP"
	if s.c.secure() {
		with = "LMTPS"
	}
	if s.t.params.utf8 {
		with = "UTF8" + with
	}
	from := s.hello
	if s.from.client.IsValid() {
		address := s.from.client.Addr().String()
		if s.from.client.Addr().Is6() {
			address = "IPv6:" + address
		}
		from += " ([" + address + "])"
	}
	return fmt.Appendf(nil, "Received: from %s\r\n\tby %s with %s id %s.%d;\r\n\t%s\r\n",
		from, s.server.options.Hostname, with, s.from.session, s.transactions, time.Now().Format(time.RFC1123Z))
}

// chunks is the state of a transaction whose body comes by BDAT (RFC 3030).
type chunks struct {
	filter *bodyFilter
	failed bool // a chunk was refused: so is every other until RSET
}

// bdat serves BDAT. The octets of the chunk are on their way whatever we say:
// they are read to the last, or the connection ends.
func (s *lmtpSession) bdat(arg string) error {
	n, last, ok := parseBDAT(arg)
	if !ok {
		return failf(Malformed, "BDAT", "argument %q", clip([]byte(arg)))
	}
	why := s.notYet("BDAT")
	wasFailed := s.chunks != nil && s.chunks.failed
	if why == nil && s.chunks == nil {
		if why = s.t.start(); why == nil {
			s.chunks = &chunks{filter: s.newFilter()}
			s.t.write(s.received())
		} else if s.t.body != nil {
			s.chunks = &chunks{filter: s.newFilter(), failed: true}
		}
	} else if why == nil && s.chunks.failed {
		r := newReply(503, "5.5.1 A chunk was refused, say RSET")
		why = &r
	}
	if why != nil {
		if err := s.skip(n); err != nil {
			return err
		}
		if last && s.t != nil && s.t.body != nil && !wasFailed {
			s.t.finish(why) // it is the end of the message: each recipient has its reply
			s.t, s.chunks, s.forwarded = nil, nil, unknownPeer
			return nil
		}
		s.reply(*why)
		if s.t == nil {
			return s.c.strike()
		}
		return nil // an MTA may have sent all its chunks at once
	}
	if err := s.chunk(n); err != nil {
		return err
	}
	f := s.chunks.filter
	switch fault := f.fault(); {
	case last:
		s.t.write(f.finish(nil))
		s.finish(f)
	case fault != nil:
		s.chunks.failed = true
		s.t.drop()
		s.reply(replyTo(fault))
	default:
		s.say(250, fmt.Sprintf("2.0.0 %d octets", n))
	}
	return nil
}

// chunk passes n octets on.
func (s *lmtpSession) chunk(n int64) error {
	for n > 0 {
		p, err := s.fill()
		if err != nil {
			return err
		}
		p = p[:min(int64(len(p)), n)]
		out := s.chunks.filter.chunk(s.work[:0], p)
		s.t.write(out)
		s.work = out
		_, _ = s.c.r.Discard(len(p))
		n -= int64(len(p))
	}
	return nil
}

// skip reads n octets for nobody.
func (s *lmtpSession) skip(n int64) error {
	for n > 0 {
		p, err := s.fill()
		if err != nil {
			return err
		}
		d, _ := s.c.r.Discard(int(min(int64(len(p)), n)))
		n -= int64(d)
	}
	return nil
}

// write gives octets of the body to all legs. It blocks while they are behind,
// see spool.Spool.
func (t *transaction) write(p []byte) {
	if len(p) > 0 {
		_, _ = t.body.Write(p) // fails only after Commit
	}
}
