package main

import (
	"maps"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/posthouse/posthouse/routing"
)

func TestSwitchMetrics(t *testing.T) {
	r := prometheus.NewRegistry()
	heard := 0
	tell := newMetrics(r).countSwitches(func(routing.Event) { heard++ })
	began := time.Now()
	tell(routing.Event{Kind: routing.EventHeld})
	tell(routing.Event{Kind: routing.EventAborted, Steps: []routing.Step{ // refused before it began
		{Phase: routing.PhasePreflight, At: began}, {Phase: routing.PhaseOpen, At: began.Add(100 * time.Millisecond)},
	}})
	tell(routing.Event{Kind: routing.EventOpened}) // of another role that was switched together with the next
	tell(routing.Event{Kind: routing.EventOpened, Steps: []routing.Step{
		{Phase: routing.PhaseHold, At: began}, {Phase: routing.PhasePromote, At: began.Add(300 * time.Millisecond)},
		{Phase: routing.PhaseOpen, At: began.Add(2 * time.Second)},
	}})
	if heard != 4 {
		t.Errorf("%d events were passed on", heard)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			label := m.GetLabel()[0].GetValue()
			if h := m.GetHistogram(); h != nil {
				got[label] = h.GetSampleSum()
			} else {
				got[label] = m.GetCounter().GetValue()
			}
		}
	}
	if want := map[string]float64{"aborted": 1, "opened": 1, "preflight": 0.1, "hold": 0.3, "promote": 1.7}; !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
