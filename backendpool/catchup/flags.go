package catchup

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"
)

// compareFlags compares the UIDs and flags of all messages in mailboxes whose
// STATUS is the same; of a mailbox that differs it names the first message.
func compareFlags(user string, sessions [2]*imapSession, found [2]holdings) ([]Difference, error) {
	var differences []Difference
	for _, it := range sortedStatus(found[0]) {
		var messages uint32
		if _, err := fmt.Sscanf(found[0][it], "%d", &messages); err != nil || found[0][it] != found[1][it] || messages == 0 {
			continue // said already, or nothing there
		}
		d, err := compareMessages(user, it.mailbox, messages, sessions)
		if err != nil {
			return nil, fmt.Errorf("mailbox %q: %w", it.mailbox, err)
		}
		if d != nil {
			differences = append(differences, *d)
		}
	}
	return differences, nil
}

func sortedStatus(h holdings) []item {
	var items []item
	for it := range h {
		if it.what == whatStatus {
			items = append(items, it)
		}
	}
	slices.SortFunc(items, func(x, y item) int { return strings.Compare(x.mailbox, y.mailbox) })
	return items
}

// compareMessages compares a mailbox of the same number of messages on both,
// a chunk at a time: sequence numbers are in the order of UIDs (RFC 9051
// §2.3.1.2), so the same chunk holds the same messages.
func compareMessages(user, mailbox string, messages uint32, sessions [2]*imapSession) (*Difference, error) {
	err := onBoth(func(i int) error {
		sessions[i].meter.refill()
		_, err := sessions[i].client.Select(mailbox, &imap.SelectOptions{ReadOnly: true}).Wait()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("EXAMINE: %w", err)
	}
	for done := uint32(0); done < messages; {
		last := done + min(chunk, messages-done) // no sum that could wrap: a server may claim 2³²−1 messages
		var has [2][]*imapclient.FetchMessageBuffer
		err := onBoth(func(i int) (err error) {
			sessions[i].meter.refill()
			has[i], err = sessions[i].flags(done+1, last)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("FETCH: %w", err)
		}
		if from, to := firstDifference(has[0], has[1]); from != to {
			return &Difference{user, mailbox, whatFlags, from, to}, nil
		}
		if uint32(len(has[0])) != last-done {
			return nil, fmt.Errorf("both members have shown %d of the messages %d to %d", len(has[0]), done+1, last)
		}
		done = last
	}
	return nil, nil
}

// flags fetches UIDs and flags of messages, sorted by UID.
func (s *imapSession) flags(first, last uint32) ([]*imapclient.FetchMessageBuffer, error) {
	var numbers imap.SeqSet
	numbers.AddRange(first, last)
	messages, err := s.client.Fetch(numbers, &imap.FetchOptions{UID: true, Flags: true}).Collect()
	slices.SortFunc(messages, func(x, y *imapclient.FetchMessageBuffer) int { return cmp.Compare(x.UID, y.UID) })
	return messages, err
}

// firstDifference puts the first two messages that differ into words; both are
// empty where all are equal.
func firstDifference(from, to []*imapclient.FetchMessageBuffer) (string, string) {
	for i := range max(len(from), len(to)) {
		f, t := "no further message", "no further message"
		if i < len(from) {
			f = messageWords(from[i])
		}
		if i < len(to) {
			t = messageWords(to[i])
		}
		if f != t {
			return f, t
		}
	}
	return "", ""
}

// messageWords: flags are case-insensitive (RFC 9051 §2.3.2) and in no order;
// \Recent is the session's.
func messageWords(m *imapclient.FetchMessageBuffer) string {
	var flags []string
	for _, flag := range m.Flags {
		if word := strings.ToLower(string(flag)); word != `\recent` {
			flags = append(flags, word)
		}
	}
	slices.Sort(flags)
	return fmt.Sprintf("UID %d (%s)", m.UID, strings.Join(flags, " "))
}
