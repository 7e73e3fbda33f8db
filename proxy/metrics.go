package proxy

import (
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/posthouse/posthouse/proxy/splice"
)

// Metrics are the proxy's. They live in a registry of the caller's.
type Metrics struct {
	registry prometheus.Registerer
	logins   *prometheus.HistogramVec
	refusals *prometheus.CounterVec
	ends     *prometheus.CounterVec
	octets   *prometheus.CounterVec
	lmtp     lmtpMetrics
}

// lmtpMetrics are those of the LMTP target, whose unit is a recipient.
type lmtpMetrics struct {
	recipients   *prometheus.CounterVec
	transactions *prometheus.CounterVec
	seconds      prometheus.Histogram
	width        prometheus.Histogram
	octets       prometheus.Counter
	spilled      prometheus.Counter
}

func newLMTPMetrics(r prometheus.Registerer) lmtpMetrics {
	m := lmtpMetrics{
		recipients: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_lmtp_recipients_total", Help: "Recipients by what the MTA was told last: delivered (2xx), deferred (4xx), refused (5xx).",
		}, []string{"outcome"}),
		transactions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_lmtp_transactions_total", Help: "Ended mail transactions: complete (all accepted recipients delivered), incomplete, abandoned (no end of the message).",
		}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "posthouse_lmtp_seconds", Help: "Mail transactions from MAIL until the last reply.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60, 300},
		}),
		width: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "posthouse_lmtp_fanout_width", Help: "Backend connections that one message goes to at a time.",
			Buckets: []float64{0, 1, 2, 3, 5, 10, 20, 50},
		}),
		octets: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "posthouse_lmtp_octets_total", Help: "Octets of complete messages, as the MTAs sent them.",
		}),
		spilled: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "posthouse_lmtp_spools_total", Help: "Messages that went to disk because a backend was slower than fanout.max_lag.",
		}),
	}
	r.MustRegister(m.recipients, m.transactions, m.seconds, m.width, m.octets, m.spilled)
	return m
}

func (m *lmtpMetrics) ended(result string, took time.Duration) {
	m.transactions.WithLabelValues(result).Inc()
	m.seconds.Observe(took.Seconds())
}

// NewMetrics registers the proxy's metrics with r.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		registry: r,
		logins: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "posthouse_login_seconds", Help: "Successful logins by protocol: from credentials to the backend's yes, parking included.",
			Buckets: []float64{.002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 25, 60},
		}, []string{"protocol"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_refusals_total", Help: "Answers that were no success, by protocol and reason.",
		}, []string{"protocol", "reason"}),
		ends: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_session_ends_total", Help: "Ended backend sessions by protocol, cause, and whether the backend proved its end.",
		}, []string{"protocol", "cause", "proven"}),
		octets: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "posthouse_octets_total", Help: "Octets of ended sessions after login, by protocol and direction (up: to the backend).",
		}, []string{"protocol", "direction"}),
	}
	r.MustRegister(m.logins, m.refusals, m.ends, m.octets)
	m.lmtp = newLMTPMetrics(r)
	return m
}

// watch adds the gauge of open connections: counted from the session list, so
// that it cannot drift.
func (m *Metrics) watch(s *Server) {
	for _, protocol := range append(slices.Collect(maps.Keys(s.protocols)), "lmtp") {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "posthouse_sessions", Help: "Open client connections by protocol.",
			ConstLabels: prometheus.Labels{"protocol": protocol},
		}, func() float64 {
			n := 0
			for _, l := range s.sessions.snapshot() {
				if l.Protocol == protocol {
					n++
				}
			}
			return float64(n)
		}))
	}
}

func (m *Metrics) loggedIn(protocol string, took time.Duration) {
	m.logins.WithLabelValues(protocol).Observe(took.Seconds())
}

func (m *Metrics) refused(protocol, reason string) {
	m.refusals.WithLabelValues(protocol, reason).Inc()
}

func (m *Metrics) ended(protocol string, r splice.Result) {
	m.ends.WithLabelValues(protocol, string(r.Cause), strconv.FormatBool(r.Proven)).Inc()
	m.octets.WithLabelValues(protocol, "up").Add(float64(r.Up))
	m.octets.WithLabelValues(protocol, "down").Add(float64(r.Down))
}
