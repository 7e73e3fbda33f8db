package integration

import (
	"fmt"
	"io"
	"slices"
	"testing"
	"time"
)

// TestSafety21: two roles on one Cyrus instance, which the shipped hooks restart. A
// switch of one takes the other with it, whichever is asked for, under clients of
// both. Somebody of ma02 who is in the middle of an APPEND to a folder of ma01's
// gets his OK, for mail that is on b afterwards.
func TestSafety21TwoRolesOnOneInstance(t *testing.T) {
	t.Parallel()
	users := userNames(7)
	ours, theirs, sharer := users[:3], users[3:6], users[6]
	h, a, b := newHookedPair(t, users...)
	s := newSite(t, a.backend(), b.backend(), users...)
	s.useHooks(h)
	s.roles = map[string]string{"ma02": "{members: [a, b], active: a" + s.hooks + "}"}
	for _, user := range append(theirs, sharer) {
		s.users[user] = "ma02"
	}
	p, second := startFrontend(t, s), startFrontend(t, s)
	for _, conf := range []string{"local.conf", "remote.conf"} {
		h.configure(t, conf, fmt.Sprintf("a.roles=ma01 ma02\nb.roles=ma01 ma02\nask=%s roles -o json -c %s\n", builtPosthouse(t, true), p.conf))
	}
	p.as(t, ours[0]).ok(t, "SETACL INBOX "+sharer+" lrswipte")
	var crowds [2]crowd
	crowds[0].start(p, ours)
	crowds[1].start(second, theirs)
	for i := range crowds {
		t.Cleanup(crowds[i].stop)
		crowds[i].everybodyLogsIn(t, time.Now().Add(-time.Minute))
	}

	for i, asked := range []string{"ma02", "ma01"} {
		to := []string{"b", "a"}[i]
		w, message := second.as(t, sharer), "Subject: shared on the way to "+to+"\r\n\r\nshared\r\n"
		must(t, w.say("m APPEND %q {%d}", "Other Users/"+ours[0], len(message)))
		_, _, err := w.until(5*time.Second, "+")
		must(t, err)
		_, err = io.WriteString(w, message[:10])
		must(t, err)

		began, ended := time.Now(), make(chan switchResult, 1)
		go func() { ended <- p.verb(t, "switch", asked, "--to", to, "--reason", t.Name()) }()
		within(t, 10*time.Second, "the role is held", func() bool { return p.togetherIn(t) == "hold" })
		must(t, w.say("%s", message[10:]))
		_, _, err = w.tagged(10*time.Second, "m")
		must(t, err)
		must(t, w.farewell(10*time.Second))
		within(t, 40*time.Second, "the switch ends", func() bool { return p.togetherIn(t) == "open" && len(ended) > 0 })
		result := <-ended
		mustOpen(t, result)
		for _, p := range []*posthouse{p, second} {
			within(t, 5*time.Second, p.name+" has both on "+to, func() bool {
				return !slices.ContainsFunc(p.rolesNamed(t, "ma01", "ma02"), func(r roleView) bool { return r.Active != to || r.Phase != "open" })
			})
		}
		for i := range crowds {
			crowds[i].everybodyLogsIn(t, began)
		}
		t.Logf("%s to %s: %v", asked, to, result.took.Round(time.Millisecond))
	}

	for i := range crowds {
		crowds[i].stop()
		for _, complaint := range crowds[i].complaints {
			t.Error(complaint)
		}
		for user, subjects := range crowds[i].acked {
			mustHaveSubjects(t, a, user, subjects...)
		}
	}
	mustHaveSubjects(t, a, ours[0], "shared on the way to b", "shared on the way to a")
	mustNotOverlap(t, a.cyrus, b.cyrus)
}

// togetherIn is the phase of both roles, which are on the same backend at any
// moment.
func (p *posthouse) togetherIn(t testing.TB) string {
	t.Helper()
	both := p.rolesNamed(t, "ma01", "ma02")
	if both[0].Active != both[1].Active || both[0].Phase != both[1].Phase {
		t.Fatalf("one is switched without the other: %+v", both)
	}
	return both[0].Phase
}

func mustHaveSubjects(t testing.TB, server mailServer, user string, subjects ...string) {
	t.Helper()
	has := subjectsOf(t, server, user)
	for _, subject := range subjects {
		if !slices.Contains(has, subject) {
			t.Errorf("%s: acknowledged, but not on the new active: %s", user, subject)
		}
	}
}
