package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// useHooks gives role ma01 the shipped hooks, driven by the frontend p asks.
func (s *site) useHooks(h *hookSite) { s.hooks = h.yaml() }

// yaml is what makes the shipped hooks those of a role. before is put in front of
// each command.
func (h *hookSite) yaml(before ...string) string {
	var hooks []string
	for _, step := range []string{"demote", "catch_up", "promote", "undo_promote", "undo_demote"} {
		command := slices.Concat(before, []string{h.script, "-c", h.config, step})
		hooks = append(hooks, fmt.Sprintf("%s: [%s]", step, strings.Join(command, ", ")))
	}
	return ", hooks: {" + strings.Join(hooks, ", ") + "}"
}

// TestSwitchesOfAMirroredPair is the whole of it: three frontends on hosts of
// their own, etcd between them, a mirrored Cyrus pair with the shipped hooks,
// clients that log in, append and idle, and an MTA at each frontend. The role goes
// back and forth; now and then a frontend is killed in the middle, comes back on
// its host and buries what it was.
//
// Every message that was acknowledged, by OK or by 250, is on the active in the
// end; nobody was refused by a switch that opened, and nobody was on both sides.
func TestSwitchesOfAMirroredPair(t *testing.T) {
	const switches, kills = 12, 3
	users := userNames(12)
	clients, readers := users[:8], users[8:]
	h, a, b := newHookedPair(t, users...)
	s := takesMail(newSite(t, a.backend(), b.backend(), users...)).shared(newEtcd(t), "3s")
	s.useHooks(h)
	frontends := []*posthouse{startFrontend(t, s), startFrontend(t, s), startFrontend(t, s)}

	var crowds [2]crowd
	for i := range crowds {
		crowds[i].start(frontends[i], clients[4*i:4*i+4])
		t.Cleanup(crowds[i].stop)
		crowds[i].everybodyLogsIn(t, time.Now().Add(-time.Minute))
	}
	parcels := make([]*parcel, 3000)
	var loaders [3]loader
	for i := range parcels {
		parcels[i] = newParcel(at("example.org", readers[i%4])...)
	}
	for i, p := range frontends {
		loaders[i] = loader{address: p.lmtp(), connections: 2, pause: 200 * time.Millisecond}
		loaders[i].start(t, parcels[1000*i:1000*i+1000])
		t.Cleanup(loaders[i].stop)
	}

	active, opened, aborted := "a", 0, 0
	var took []time.Duration
	for i := range switches {
		to := map[string]string{"a": "b", "b": "a"}[active]
		began := time.Now()
		ended := frontends[i%2].startSwitch(t, to)
		if i%(switches/kills) == 2 {
			within(t, 10*time.Second, "the switch is under way", func() bool { return frontends[i%2].role(t).Phase != "open" || len(ended) > 0 })
			frontends[2].kill()
			frontends[2].start(t)
			frontends[2].ready(t)
		}
		result := <-ended
		for _, p := range frontends {
			within(t, 30*time.Second, p.name+" has the role open", func() bool { return p.role(t).Phase == "open" })
		}
		if active = frontends[0].role(t).Active; active == to {
			opened++
			took = append(took, result.took)
		} else {
			aborted++
			t.Logf("switch %d to %s was turned back: %s", i, to, lastLine(result.said))
		}
		for i := range crowds {
			if active == to { // else it may have been refused before anybody was ended
				crowds[i].everybodyLogsIn(t, began)
			}
		}
	}
	for i := range crowds {
		crowds[i].stop()
		for _, complaint := range crowds[i].complaints {
			t.Error(complaint)
		}
	}
	twice, lost := 0, int64(0)
	for i := range loaders {
		loaders[i].finish(t, 120*time.Second)
		lost += loaders[i].lost.Load()
	}
	mustBeAccepted(t, parcels)
	server := map[string]hookedCyrus{"a": a, "b": b}[active]
	for rcpt, sent := range byRecipient(parcels) {
		twice += mustHave(t, server, localPart(rcpt), sent)
	}
	appended := 0
	for i := range crowds {
		for _, user := range crowds[i].users {
			has, err := server.as(t, user).subjects("INBOX")
			must(t, err)
			appended += len(crowds[i].acked[user])
			for _, subject := range crowds[i].acked[user] {
				if !slices.Contains(has, subject) {
					t.Errorf("%s: acknowledged, but not on %s: %s", user, active, subject)
				}
			}
		}
	}
	mustNotOverlap(t, a.cyrus, b.cyrus)
	if opened < switches-kills {
		t.Errorf("%d of %d switches opened", opened, switches)
	}
	slices.Sort(took)
	t.Logf("%d switches opened, %d turned back; command to end: median %v, longest %v; %d messages by LMTP, %d twice, %d connections lost; %d appended",
		opened, aborted, took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond), len(parcels), twice, lost, appended)
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
